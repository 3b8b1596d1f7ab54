"""What reruns when something changes, as `dvc status` says. One change is also carried out, to the new page.

tests/test_layout.py checks what dvc.yaml lists for each stage, and tests/test_docs.py the picture of what follows what.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ruamel.yaml import YAML

if TYPE_CHECKING:
    from tests.pipeline.conftest import Project

pytestmark = pytest.mark.pipeline

EVALUATIONS = {"evaluate@base", "evaluate@sft", "evaluate@dpo"}
VOTES = {"vote@base", "vote@sft", "vote@dpo"}
AFTER_COHERENCE = {"preference@dpo", "dpo@dpo", "evaluate@dpo", "headline", "report"}


@pytest.fixture(scope="module")
def shared(copy_run: Callable[[], Project]) -> Project:
    """A copy of the run, in which the tests change one thing at a time."""
    return copy_run()


@pytest.fixture
def project(shared: Project) -> Iterator[Project]:
    """The shared copy. Its files are restored after the test."""
    yield shared
    shared.run("git", "checkout", "--quiet", "--", ".")


def change(project: Project, file: str, key: str, by: Callable[[Any], Any]) -> None:
    """Change one value; `*` in the key stands for the first name at that level."""
    value = YAML(typ="safe").load((project.root / file).read_text(encoding="utf-8"))
    names = []
    for part in key.split("."):
        names.append(next(iter(value)) if part == "*" else part)
        value = value[names[-1]]
    assert by(value) != value
    project.update(file, {".".join(names): by(value)})


TINY = "profiles/tiny.yaml"


@pytest.mark.parametrize(
    ("file", "key", "by", "stages"),
    [
        ("params.yaml", "regime_w.weights.s_cf", lambda x: x + 0.1, {"coherence@dpo", *VOTES}),
        ("params.yaml", "regime_w.reward.kappa", lambda x: x / 2, {"coherence@dpo"}),
        ("params.yaml", "regime_w.vote", lambda _: "s_wm", VOTES),
        ("params.yaml", "preference.coherence.min_margin", lambda x: x * 2, {"preference@dpo"}),
        (TINY, "rollout.arms.*.temperature", lambda x: x + 0.1, {"rollout@dpo"}),
        (TINY, "data.changed", lambda _: "all", {"prepare"}),
        (TINY, "data.tests.*.questions", lambda x: x + 1, {"prepare"}),
        (TINY, "dpo.beta", lambda x: x * 2, {"dpo@dpo"}),
        (TINY, "sft.lora.r", lambda x: x * 2, {"sft"}),
        (TINY, "sft.select.level", lambda x: x / 2, {"sft"}),
        (TINY, "dpo.select.questions", lambda x: x - 1, {"dpo@dpo"}),
    ],
)
def test_a_parameter_reruns_its_stages(
    project: Project, file: str, key: str, by: Callable[[Any], Any], stages: set[str]
) -> None:
    change(project, file, key, by)
    assert set(project.status()) == stages


def test_comments_and_hardware_rerun_nothing(project: Project) -> None:
    for file in ("params.yaml", TINY):
        path = project.root / file
        path.write_text(
            "# A remark.\n" + path.read_text(encoding="utf-8") + "\n# Another.\n", encoding="utf-8"
        )
    changes: dict[str, Callable[[Any], Any]] = {
        "threads": lambda x: x + 1,
        "processes": lambda x: x + 1,
        "engine": lambda _: "transformers",
        "generation_batch": lambda x: x // 2,
        "per_device_batch": lambda x: x // 2,
        "gradient_checkpointing": lambda x: not x,
        "seconds": lambda x: x | {"sft": 1},
    }
    assert set(YAML(typ="safe").load(project.root / TINY)["hardware"]) == set(changes)
    for key, by in changes.items():
        change(project, TINY, f"hardware.{key}", by)
    assert project.status() == {}


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("stages/evaluate.py", EVALUATIONS),
        ("stages/regime_w/changed.py", {"prepare", "coherence@dpo", "preference@dpo", *VOTES}),
        ("stages/stats/changed.py", {"report", *EVALUATIONS, *VOTES}),
        ("stages/tiny/twins.py", {"prepare", "base"}),
        ("stages/text/testsets.py", {"prepare", *EVALUATIONS}),
        ("stages/stats/testsets.py", {"report", *EVALUATIONS, *VOTES}),
        ("stages/regime_w/bandit.py", {"rollout@dpo", "coherence@dpo", "preference@dpo", *VOTES}),
        ("stages/stats/vote.py", {"report", *VOTES}),
        ("stages/train/selection.py", {"sft", "dpo@dpo"}),
        ("stages/train/pair_trainer.py", {"dpo@dpo"}),
        ("stages/stats/looks.py", {"sft", "dpo@dpo", "report", *VOTES}),
        ("stages/page/svg.py", {"report"}),
        ("stages/engine/load.py", set()),  # how it is run
    ],
)
def test_changed_code_reruns_the_stages_that_compute_with_it(
    project: Project, file: str, stages: set[str]
) -> None:
    """Even a comment does, because DVC compares bytes."""
    with (project.root / file).open("a", encoding="utf-8") as code:
        code.write("\n# A comment.\n")
    assert set(project.status()) == stages


def test_a_private_scorer_outside_the_tree_is_a_dependency(copy_run: Callable[[], Project]) -> None:
    """The scorer may lie anywhere. Its content is compared, and no absolute path is written down."""
    project = copy_run()
    private = project.root.parent / "private" / "scorer.py"
    private.parent.mkdir()
    shipped = (project.root / "stages/regime_w/signals.py").read_text(encoding="utf-8")
    private.write_text(shipped, encoding="utf-8")
    project.update("params.yaml", {"regime_w.scorer": "../private/scorer.py"})
    assert set(project.repro("coherence", *sorted(VOTES))) == {"coherence@dpo", *VOTES}
    assert project.status() == {}  # the same scores: nothing follows
    private.write_text(shipped + "\n# changed\n", encoding="utf-8")
    status = project.status()
    assert set(status) == {"coherence@dpo", *VOTES}
    (changed,) = status["coherence@dpo"]
    assert [Path(name).name for name in changed["changed deps"]] == ["scorer.py"]
    lock = (project.root / "dvc.lock").read_text(encoding="utf-8")
    assert "- path: ../private/scorer.py" in lock
    assert str(project.root.parent) not in lock


def test_an_edited_file_of_ones_own_reruns_what_reads_it(small_project: Project, tmp_path: Path) -> None:
    """Questions and a model outside the tree: an edit is seen without `-f`, and without one nothing runs."""
    project = replace(small_project, root=tmp_path / "project")
    shutil.copytree(small_project.root, project.root, symlinks=True)
    questions, model = project.root.parent / "questions", project.root.parent / "model"
    questions.mkdir()
    for name in ("train", "platinum"):
        shutil.copy(project.root / "examples" / f"{name}.jsonl", questions)
    shutil.copytree(project.root / "examples/tests", questions / "tests")
    shutil.copytree(project.root / "stages/tiny/base", model)
    own = {name: f"../questions/{name}.jsonl" for name in ("train", "platinum")}
    project.update("params.yaml", {"own": own | {"tests": "../questions/tests", "model": "../model"}})
    daily = {"source": "file", "file": "daily.csv", "question": ["Body", "Question"], "answer": "Answer"}
    data = {"source": "files", "changed": "one", "tests": {"daily": daily}, "valid": 3}
    base = {"source": "directory", "dtype": "float32"}
    project.update(TINY, {"data": data, "model": base})
    stages = ("prepare", "base")
    assert sorted(project.repro(*stages)) == sorted(stages)  # neither needs the other
    assert project.repro(*stages) == []
    with (questions / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"question": "What is 5 - 3?", "answer": "#### 2"}\n')
    with (questions / "tests/daily.csv").open("a", encoding="utf-8") as file:
        file.write("Tom has 7 hens.,How many hens?,7\n")
    (model / "remark.txt").write_text("new", encoding="utf-8")
    status = project.status()
    changed = {stage: [*status[stage][0]["changed deps"]] for stage in stages}
    names = [Path(path).name for paths in changed.values() for path in paths]
    assert names == ["train.jsonl", "tests", "model"]
    assert sorted(project.repro(*stages)) == sorted(stages)  # neither needs the other
    assert project.repro(*stages) == []
    project.update("params.yaml", {"own.train": "../questions/none.jsonl"})
    failed = project.run("dvc", "repro", "prepare", check=False)
    assert failed.returncode and "none.jsonl" in failed.stderr


def test_a_regime_w_weight_really_reruns_what_follows_and_nothing_before(
    copy_run: Callable[[], Project],
) -> None:
    project = copy_run()
    early = [
        "data/gsm8k",
        "data/rollouts/dpo.jsonl",
        "checkpoints/base",
        "checkpoints/sft_lora",
        "data/platinum_eval/sft.jsonl",
    ]
    times = {name: (project.root / name).stat().st_mtime_ns for name in early}
    scored = (project.root / "data/regime_w_rollouts/dpo.jsonl").read_bytes()
    project.update("params.yaml", {"regime_w.weights": {"s_end": 0.1, "s_path": 0.1, "s_cf": 0.8}})
    plan = json.loads(project.stages("plan", "--json").stdout)
    ran = project.repro()
    will_run = {one["stage"]: one for one in plan["will_run"]}
    assert set(will_run) == {"coherence@dpo", *VOTES}
    coherence = will_run["coherence@dpo"]
    assert any("regime_w.weights.s_cf" in why and why.endswith("→ 0.8") for why in coherence["reasons"])
    assert coherence["last"]["seconds"] > 0
    assert {one["stage"] for one in plan["may_follow"]} == AFTER_COHERENCE
    assert [stage for stage in ran if stage not in VOTES][:3] == [
        "coherence@dpo",
        "preference@dpo",
        "dpo@dpo",
    ]
    assert VOTES < set(ran) <= {"coherence@dpo", *VOTES, *AFTER_COHERENCE}
    assert "report" in ran
    assert {name: (project.root / name).stat().st_mtime_ns for name in early} == times
    assert (project.root / "data/regime_w_rollouts/dpo.jsonl").read_bytes() != scored
    assert project.status() == {}


def test_another_signal_for_the_vote_reruns_the_votes_and_the_page(copy_run: Callable[[], Project]) -> None:
    project = copy_run()
    elected = (project.root / "metrics/vote/sft.json").read_bytes()
    project.update("params.yaml", {"regime_w.vote": "s_end"})
    ran = project.repro()
    assert set(ran) == {*VOTES, "report"}
    assert (project.root / "metrics/vote/sft.json").read_bytes() != elected
    few = json.loads((project.root / "metrics/vote/sft.json").read_text())
    assert few["coherent_at_4"] == few["maj_at_4"]  # s_end is the majority
    assert project.status() == {}


def test_other_twins_and_test_sets_are_asked_and_nothing_is_trained_again(
    copy_run: Callable[[], Project],
) -> None:
    """They change no training data. Without any, the metrics and the page have none of their figures."""
    project = copy_run()
    sft, page = project.root / "metrics/platinum/sft.json", project.root / "report.html"
    assert list(json.loads(sft.read_text())["tests"]) == ["larger"]
    assert 'id="tests"' in page.read_text(encoding="utf-8")
    project.update(TINY, {"data.changed": "none", "data.tests": {}})
    ran = set(project.repro())
    # Other batches may round the samples' log-probabilities otherwise, and then the votes follow.
    after = {"prepare", *EVALUATIONS, "headline", "report"}
    assert after <= ran <= {*after, *VOTES}
    few = json.loads(sft.read_text())
    assert "accuracy" in few and not {"changed", "both", "kept", "tests"} & set(few)
    assert '"twins"' not in (project.root / "data/platinum_eval/sft.jsonl").read_text(encoding="utf-8")
    assert (project.root / "data/tests_eval/sft.jsonl").read_bytes() == b""
    assert not re.search('id="(twins|tests)"', page.read_text(encoding="utf-8"))
