"""What reruns when something changes: every rule of the design, asked of DVC itself.

`dvc status` names the stages that are out of date by themselves; what follows them is in DVC's graph. One
rule is also carried out, from the changed weight to the new page.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx
import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML

if TYPE_CHECKING:
    from tests.pipeline.conftest import Project

pytestmark = pytest.mark.pipeline

AFTER_DPO = ["evaluate@dpo", "headline", "report"]
AFTER_PREFERENCE = ["dpo", *AFTER_DPO]
AFTER_COHERENCE = ["preference", *AFTER_PREFERENCE, "report"]
AFTER_ROLLOUT = ["coherence", *AFTER_COHERENCE]
EVALUATIONS = {"evaluate@base", "evaluate@sft", "evaluate@dpo"}


@pytest.fixture(scope="module")
def shared(copy_run: Callable[[], Project]) -> Project:
    """A copy of the run in which one thing at a time is changed."""
    return copy_run()


@pytest.fixture
def project(shared: Project) -> Iterator[Project]:
    """The shared copy, with its files put back after the test."""
    assert shared.status() == {}
    yield shared
    shared.run("git", "checkout", "--quiet", "--", ".")


@pytest.fixture(scope="module")
def followers(shared: Project) -> Callable[[str], set[str]]:
    """A function from a stage to all stages that come after it."""
    before = Path.cwd()
    os.chdir(shared.root)
    try:
        with Repo(str(shared.root)) as repo:
            edges = [(a.addressing, b.addressing) for a, b in repo.index.graph.edges]
    finally:
        os.chdir(before)
    graph = networkx.DiGraph(edges)  # from a stage to what it depends on
    return lambda stage: networkx.ancestors(graph, stage)


def change(project: Project, file: str, key: str, by: Callable[[Any], Any]) -> None:
    """Change one value; `*` in the key stands for the first name there is."""
    value = YAML(typ="safe").load((project.root / file).read_text(encoding="utf-8"))
    names = []
    for part in key.split("."):
        names.append(next(iter(value)) if part == "*" else part)
        value = value[names[-1]]
    assert by(value) != value
    project.update(file, {".".join(names): by(value)})


TINY = "profiles/tiny.yaml"


@pytest.mark.parametrize(
    ("file", "key", "by", "first", "after"),
    [
        ("params.yaml", "regime_w.weights.s_cf", lambda x: x + 0.1, "coherence", AFTER_COHERENCE),
        ("params.yaml", "regime_w.reward.kappa", lambda x: x / 2, "coherence", AFTER_COHERENCE),
        (TINY, "rollout.arms.*.temperature", lambda x: x + 0.1, "rollout", AFTER_ROLLOUT),
        (TINY, "rollout.arms.*.top_p", lambda x: x - 0.3, "rollout", AFTER_ROLLOUT),
        (
            "params.yaml",
            "preference.correctness.per_question",
            lambda x: x + 1,
            "preference",
            AFTER_PREFERENCE,
        ),
        ("params.yaml", "preference.coherence.min_margin", lambda x: x * 2, "preference", AFTER_PREFERENCE),
        (TINY, "dpo.beta", lambda x: x * 2, "dpo", AFTER_DPO),
        (TINY, "dpo.learning_rate", lambda x: x / 2, "dpo", AFTER_DPO),
        (TINY, "sft.lora.r", lambda x: x * 2, "sft", ["rollout", "evaluate@sft", *AFTER_ROLLOUT]),
    ],
)
def test_a_parameter_reruns_its_stage_and_what_follows(
    project: Project,
    followers: Callable[[str], set[str]],
    file: str,
    key: str,
    by: Callable[[Any], Any],
    first: str,
    after: list[str],
) -> None:
    change(project, file, key, by)
    assert set(project.status()) == {first}
    assert followers(first) == set(after)


@pytest.mark.parametrize("file", ["params.yaml", TINY])
def test_a_comment_reruns_nothing(project: Project, file: str) -> None:
    path = project.root / file
    path.write_text(
        "# A remark.\n" + path.read_text(encoding="utf-8") + "\n# And another.\n", encoding="utf-8"
    )
    assert project.status() == {}


@pytest.mark.parametrize(
    ("key", "by"),
    [
        ("threads", lambda x: x + 1),
        ("processes", lambda x: x + 1),
        ("engine", lambda _: "transformers"),
        ("generation_batch", lambda x: x // 2),
        ("per_device_batch", lambda x: x // 2),
        ("gradient_checkpointing", lambda x: not x),
    ],
)
def test_a_hardware_value_reruns_nothing(project: Project, key: str, by: Callable[[Any], Any]) -> None:
    change(project, TINY, f"hardware.{key}", by)
    assert project.status() == {}


def test_all_hardware_values_were_tried(project: Project) -> None:
    tree = YAML(typ="safe").load((project.root / TINY).read_text(encoding="utf-8"))
    assert {*tree["hardware"]} >= {
        "threads", "processes", "engine", "generation_batch", "per_device_batch", "gradient_checkpointing"
    }  # fmt: skip


def test_log_level_and_devices_rerun_nothing(project: Project) -> None:
    """They come from the environment, which is part of no stage."""
    loud = {
        "TRANSFORMERS_VERBOSITY": "debug",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "7",
    }
    assert project.status(**loud) == {}


def test_the_headline_policy_reruns_the_copying_alone(project: Project) -> None:
    """That is what makes `dvc exp run -S headline.policy=sft` cheap."""
    project.update("params.yaml", {"headline.policy": "sft"})
    assert project.repro() == ["headline"]
    headline, sft = (project.root / f"metrics/{name}.json" for name in ("headline", "platinum/sft"))
    assert headline.read_bytes() == sft.read_bytes()


@pytest.mark.parametrize(
    ("module", "stages"),
    [
        ("stages/rollout.py", {"rollout"}),
        ("stages/regime_w/reward.py", {"coherence"}),
        ("stages/core/svg.py", {"report"}),
        ("stages/evaluate.py", EVALUATIONS),
        ("stages/tools/check.py", set()),
        ("stages/__main__.py", set()),
        ("README.md", set()),
    ],
)
def test_code_reruns_the_stages_that_import_it(project: Project, module: str, stages: set[str]) -> None:
    with (project.root / module).open("a", encoding="utf-8") as file:
        file.write("\n# A remark in code counts: DVC compares bytes.\n")
    assert set(project.status()) == stages


def test_a_second_repro_runs_nothing(project: Project) -> None:
    done = project.run("dvc", "repro")
    assert "Running stage" not in done.stdout
    assert "up to date" in done.stdout


def test_a_private_scorer_outside_the_tree_reruns_coherence(copy_run: Callable[[], Project]) -> None:
    """The scorer may lie anywhere; its content is compared, as any input's, and no absolute path is noted."""
    project = copy_run()
    private = project.root.parent / "private" / "scorer.py"
    private.parent.mkdir()
    shipped = (project.root / "stages/regime_w/signals.py").read_text(encoding="utf-8")
    private.write_text(shipped, encoding="utf-8")
    project.update("params.yaml", {"regime_w.scorer": "../private/scorer.py"})
    assert project.repro("coherence") == ["coherence"]
    assert project.status() == {}  # the same scores: nothing follows
    private.write_text(shipped + "\n# changed\n", encoding="utf-8")
    status = project.status()
    assert set(status) == {"coherence"}
    (changed,) = status["coherence"]
    assert [Path(name).name for name in changed["changed deps"]] == ["scorer.py"]
    lock = (project.root / "dvc.lock").read_text(encoding="utf-8")
    assert "- path: ../private/scorer.py" in lock
    assert str(project.root.parent) not in lock


def test_a_regime_w_weight_really_reruns_what_follows_and_nothing_before(
    copy_run: Callable[[], Project],
) -> None:
    project = copy_run()
    early = [
        "data/gsm8k",
        "data/rollouts.jsonl",
        "checkpoints/base",
        "checkpoints/sft_lora",
        "data/platinum_eval/sft.jsonl",
    ]
    times = {name: (project.root / name).stat().st_mtime_ns for name in early}
    scored = (project.root / "data/regime_w_rollouts.jsonl").read_bytes()
    project.update("params.yaml", {"regime_w.weights": {"s_end": 0.1, "s_path": 0.1, "s_cf": 0.8}})
    plan = json.loads(project.stages("plan", "--json").stdout)
    ran = project.repro()
    (coherence,) = plan["will_run"]
    keys = {reason["key"]: reason["new"] for reason in coherence["reasons"]}
    assert coherence["stage"] == "coherence" and keys["regime_w.weights.s_cf"] == 0.8
    assert coherence["last"]["seconds"] > 0
    assert {one["stage"] for one in plan["may_follow"]} == set(AFTER_COHERENCE)
    assert {"coherence"} <= set(ran) <= {"coherence", *(one["stage"] for one in plan["may_follow"])}
    assert ran[:3] == ["coherence", "preference", "dpo"]
    assert set(ran) <= {"coherence", *AFTER_COHERENCE}
    assert "report" in ran
    assert {name: (project.root / name).stat().st_mtime_ns for name in early} == times
    assert (project.root / "data/regime_w_rollouts.jsonl").read_bytes() != scored
    assert project.status() == {}
