"""Two rounds: the first gives the bytes of a single one, the second goes on from it with other questions."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.pipeline.test_kill import CASES, Undisturbed, kill_repeatedly, read_outputs

if TYPE_CHECKING:
    from tests.pipeline.conftest import Project

pytestmark = pytest.mark.pipeline

FIRST = "checkpoints/dpo_coherence_lora/round1"
ROUND1 = {"start": "checkpoints/sft_lora", "rollout": {}, "preference": {}, "dpo": {}}
ROUND2 = {**ROUND1, "start": FIRST}
POLICIES = {
    "base": "checkpoints/base/manifest.json",
    "sft": "checkpoints/sft_lora",
    "round1": FIRST,
    "dpo": "checkpoints/dpo_coherence_lora/dpo",
}
OF_A_ROUND = ("rollout", "coherence", "preference", "dpo", "evaluate", "vote")


@pytest.fixture(scope="module")
def two_rounds(copy_run: Callable[[], Project]) -> Project:
    """The small run, with a second round after it. Its files in git are those of the second run."""
    project = copy_run()
    project.update("params.yaml", {"rounds": {"round1": ROUND1, "dpo": ROUND2}, "policies": POLICIES})
    ran = project.repro()
    wanted = {f"{stage}@{name}" for stage in OF_A_ROUND for name in ("round1", "dpo")}
    assert wanted - {"vote@dpo"} <= set(ran) <= {*wanted, "headline", "report"}
    assert project.repro() == []
    who = ["-c", "user.name=tests", "-c", "user.email=tests@localhost", "-c", "commit.gpgsign=false"]
    project.run("git", "add", "--all")
    project.run("git", *who, "commit", "--quiet", "--message", "two rounds")
    return project


@pytest.fixture
def project(two_rounds: Project) -> Iterator[Project]:
    """The two rounds. Files that git has are restored after the test."""
    yield two_rounds
    two_rounds.run("git", "checkout", "--quiet", "--", ".")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def scores(path: Path) -> list[float]:
    with path.open(encoding="utf-8", newline="") as file:
        return [float(row["score"]) for row in csv.DictReader(file)]


def test_the_first_round_gives_the_bytes_of_a_single_one(two_rounds: Project, small_run: Project) -> None:
    for name in (
        "data/rollouts/{}.jsonl",
        "data/regime_w_rollouts/{}.jsonl",
        "data/coherence_preferences/{}.jsonl",
        "checkpoints/dpo_coherence_lora/{}/adapter_model.safetensors",
        "metrics/curves/{}_selection.csv",
        "metrics/platinum_details/{}.json",
    ):
        single = (small_run.root / name.format("dpo")).read_bytes()
        assert (two_rounds.root / name.format("round1")).read_bytes() == single, name


def test_the_second_round_goes_on_where_the_first_one_ended(two_rounds: Project) -> None:
    root = two_rounds.root
    one, two = (rows_of(root / f"data/rollouts/{name}.jsonl") for name in ("round1", "dpo"))
    assert len(one) == len(two) and not {row["id"] for row in one} & {row["id"] for row in two}
    curves = root / "metrics/curves"
    assert scores(curves / "dpo_selection.csv")[0] == max(scores(curves / "round1_selection.csv"))
    manifest = json.loads((root / "data/rollouts/dpo.manifest.json").read_text())
    assert manifest["stage"] == "rollout@dpo" and FIRST in manifest["inputs"]


def test_all_tools_know_the_rounds(two_rounds: Project) -> None:
    root = two_rounds.root
    comparison = json.loads((root / "metrics/comparison.json").read_text())
    assert list(comparison) == ["base_to_sft", "sft_to_round1", "round1_to_dpo", "sft_to_dpo", "base_to_dpo"]
    page = (root / "report.html").read_text(encoding="utf-8")
    assert "Rounds</h3>" in page and "SFT → round1" in page and "round1 → DPO" in page
    assert "Manifests, files and dvc.lock do not agree" not in page
    shown = two_rounds.stages("results").stdout
    assert re.findall(r"^ *(base|SFT|round1|DPO)(?:, step 0)? ", shown, re.MULTILINE)[:4] == [
        "base",
        "SFT",
        "round1",
        "DPO",
    ]
    assert "round1 → DPO" in shown and "SFT → DPO" in shown
    for name, start in (("round1", "SFT"), ("dpo", "round1")):
        pair = rows_of(root / f"data/coherence_preferences/{name}.jsonl")[0]
        traced = json.loads(two_rounds.stages("trace", pair["id"], "--json").stdout)
        assert traced["broken"] == [] and traced["notes"][0].startswith(f"Drawn from the {start} policy")
        steps = [step["stage"] for step in traced["steps"]]
        assert steps[0] == f"dpo@{name}" and ("dpo@round1" in steps) and steps[-1] == "prepare"
        explained = json.loads(two_rounds.stages("explain", pair["question_id"], "--json").stdout)
        assert explained["id"] == pair["question_id"]
    answer = two_rounds.stages("ask", "Ann has 3 bags of 4 apples. How many?", "--policy", "round1").stdout
    assert "answer: " in answer
    refused = two_rounds.stages("evaluate", "round7", check=False)
    assert refused.returncode == 1
    assert "policy 'round7' is unknown; choose one of base, sft, round1, dpo" in refused.stderr


@pytest.mark.parametrize(
    ("file", "key", "value", "stages"),
    [
        ("params.yaml", "rounds.dpo.rollout", {"max_new_tokens": 100}, {"rollout@dpo"}),
        ("params.yaml", "rounds.dpo.preference", {"sound_only": True}, {"preference@dpo"}),
        ("params.yaml", "rounds.dpo.dpo", {"learning_rate": 1e-4}, {"dpo@dpo"}),
        ("params.yaml", "rounds.round1.dpo", {"beta": 0.2}, {"dpo@round1"}),
        ("profiles/tiny.yaml", "dpo.beta", 0.2, {"dpo@round1", "dpo@dpo"}),
    ],
)
def test_what_a_round_has_of_its_own_reruns_this_round(
    project: Project, file: str, key: str, value: Any, stages: set[str]
) -> None:
    """The report names what each round has of its own, so it runs again too."""
    project.update(file, {key: value})
    assert set(project.status()) == stages | ({"report"} if file == "params.yaml" else set())


def test_a_rate_of_the_last_round_runs_nothing_of_the_first(two_rounds: Project, tmp_path: Path) -> None:
    """It is used, and manifests, dvc.lock and `trace` say it."""
    project = replace(two_rounds, root=tmp_path / "project")
    shutil.copytree(two_rounds.root, project.root, symlinks=True)
    project.update("params.yaml", {"rounds.dpo.dpo": {"learning_rate": 1e-4, "reference": "sft"}})
    ran = set(project.repro())
    assert {"dpo@dpo", "report"} <= ran <= {"dpo@dpo", "evaluate@dpo", "vote@dpo", "headline", "report"}
    with (project.root / "metrics/curves/dpo.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert max(float(row["learning_rate"]) for row in rows) <= 1e-4
    assert abs(float(rows[0]["loss"]) - 0.6931) > 1e-3  # the reference is not where the policy starts
    traced = json.loads(project.stages("trace", "platinum-00000", "--json").stdout)
    (step,) = (one for one in traced["steps"] if one["stage"] == "dpo@dpo")
    assert step["params"]["rounds"]["dpo"]["dpo"] == {"learning_rate": 1e-4, "reference": "sft"}
    assert traced["broken"] == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["rollout", "dpo"])
def test_the_second_round_is_killed(
    stage: str, two_rounds: Project, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """As tests/pipeline/test_kill.py does with a single round."""
    project = replace(two_rounds, root=tmp_path / "project").cold
    shutil.copytree(two_rounds.root, project.root, symlinks=True)
    alone = Undisturbed(read_outputs(project, CASES[stage]), 1.0, 3.0)
    kills = min(2, pytestconfig.getoption("--kills"))
    result = kill_repeatedly(project, CASES[stage], alone, kills, seed=stage, log=tmp_path / "log")
    assert not result.trouble, result.trouble
    assert len(result.kills) == kills
