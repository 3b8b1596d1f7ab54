"""What reruns when something changes, as DVC itself says, and when a stage goes on from half-done work.

`dvc status` names the stages that are out of date by themselves, and DVC's graph says which ones follow. One change is
also carried out, from a weight of Regime W to the new page.
"""

from __future__ import annotations

import json
import os
import signal
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
# The code that only says how a stage is run.
RUNNING = (
    "stages/run/*.py",
    "stages/launch/*.py",
    "stages/engine/*.py",
    "stages/tools/*.py",
    "stages/__main__.py",
)


@pytest.fixture(scope="module")
def shared(copy_run: Callable[[], Project]) -> Project:
    """A copy of the run, in which the tests change one thing at a time."""
    return copy_run()


@pytest.fixture
def project(shared: Project) -> Iterator[Project]:
    """The shared copy. Its files are restored after the test."""
    assert shared.status() == {}
    yield shared
    shared.run("git", "checkout", "--quiet", "--", ".")


@pytest.fixture(scope="module")
def followers(shared: Project) -> Callable[[str], set[str]]:
    """A function that returns all stages that come after a stage."""
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
    }
    assert set(YAML(typ="safe").load(project.root / TINY)["hardware"]) == set(changes)
    for key, by in changes.items():
        change(project, TINY, f"hardware.{key}", by)
    assert project.status() == {}


def test_the_headline_policy_reruns_the_copying_alone(project: Project) -> None:
    """So `dvc exp run -S headline.policy=sft` takes seconds."""
    project.update("params.yaml", {"headline.policy": "sft"})
    assert project.repro() == ["headline"]
    headline, sft = (project.root / f"metrics/{name}.json" for name in ("headline", "platinum/sft"))
    assert headline.read_bytes() == sft.read_bytes()


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("stages/rollout.py", {"rollout"}),
        ("stages/evaluate.py", EVALUATIONS),
        ("stages/regime_w/reward.py", {"coherence", "preference"}),
        ("stages/regime_w/bandit.py", {"rollout", "coherence", "preference"}),
        ("stages/page/svg.py", {"report"}),
        ("stages/text/answers.py", {"prepare", "rollout", "coherence", "dpo", *EVALUATIONS}),
    ],
)
def test_changed_code_reruns_the_stages_that_compute_with_it(
    project: Project, file: str, stages: set[str]
) -> None:
    """Even a comment does, because DVC compares bytes."""
    append_a_comment(project.root / file)
    assert set(project.status()) == stages


def test_a_higher_number_in_results_reruns_every_stage_with_a_model(project: Project) -> None:
    """It is the switch for a change in how stages are run that alters what comes out."""
    path = project.root / "stages/run/RESULTS"
    path.write_text(f"{int(path.read_text()) + 1}\n")
    assert set(project.status()) == {"base", "sft", "rollout", "dpo", *EVALUATIONS}


def test_changed_code_of_how_it_runs_reruns_nothing(project: Project) -> None:
    files = [path for pattern in RUNNING for path in project.root.glob(pattern)]
    assert len(files) > 30
    for path in [*files, project.root / "README.md"]:
        append_a_comment(path)
    assert project.status() == {}


def append_a_comment(path: Path) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("\n# A comment.\n")


# Run the stage as usual. In the first program a thread kills the process once the journal on the disk has grown. The
# second one prints how many records were added to the journal.
KILLED_ROLLOUT = """
import os, pathlib, signal, sys, threading, time
from stages.policy import complete

complete.FLUSH_SECONDS = 0.0

def kill_when_some_is_done():
    while True:
        for journal in pathlib.Path(".work/rollout").glob("*/journal.jsonl"):
            if journal.stat().st_size > 2000:
                os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.001)

threading.Thread(target=kill_when_some_is_done, daemon=True).start()
sys.argv = ["stages", "rollout"]
from stages.__main__ import main
main()
"""
COUNTED_ROLLOUT = """
import sys
from stages.run.journal import Journal

count, add = 0, Journal.add

def counting(self, record):
    global count
    count += 1
    add(self, record)

Journal.add = counting
sys.argv = ["stages", "rollout"]
from stages.__main__ import main
try:
    main()
finally:
    print(count)
"""


@pytest.mark.parametrize(
    ("changed", "goes_on"),
    [(RUNNING, True), (("stages/text/answers.py",), False)],
    ids=["how it runs", "what it computes"],
)
def test_a_killed_rollout_goes_on_unless_what_it_computes_changed(
    copy_run: Callable[[], Project], changed: tuple[str, ...], goes_on: bool
) -> None:
    """Its progress is kept under the very code that DVC compares. The result is that of an undisturbed run."""
    project = copy_run()
    rollouts = project.root / "data/rollouts.jsonl"
    undisturbed = rollouts.read_bytes()
    rollouts.unlink()
    killed = project.run("python", "-c", KILLED_ROLLOUT, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not rollouts.exists()
    (journal,) = (project.root / ".work/rollout").glob("*/journal.jsonl")
    kept = journal.read_bytes().count(b"\n")
    assert 0 < kept < 400
    for path in [path for pattern in changed for path in project.root.glob(pattern)]:
        append_a_comment(path)
    made = int(project.run("python", "-c", COUNTED_ROLLOUT).stdout)
    assert made == (400 - kept if goes_on else 400)
    assert rollouts.read_bytes() == undisturbed
    assert not journal.exists()


def test_a_second_repro_runs_nothing(project: Project) -> None:
    done = project.run("dvc", "repro")
    assert "Running stage" not in done.stdout
    assert "up to date" in done.stdout


def test_a_private_scorer_outside_the_tree_reruns_coherence(copy_run: Callable[[], Project]) -> None:
    """The scorer may lie anywhere. Its content is compared, and no absolute path is written down."""
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
    assert coherence["stage"] == "coherence"
    assert any("regime_w.weights.s_cf" in why and why.endswith("→ 0.8") for why in coherence["reasons"])
    assert coherence["last"]["seconds"] > 0
    assert {one["stage"] for one in plan["may_follow"]} == set(AFTER_COHERENCE)
    assert {"coherence"} <= set(ran) <= {"coherence", *(one["stage"] for one in plan["may_follow"])}
    assert ran[:3] == ["coherence", "preference", "dpo"]
    assert set(ran) <= {"coherence", *AFTER_COHERENCE}
    assert "report" in ran
    assert {name: (project.root / name).stat().st_mtime_ns for name in early} == times
    assert (project.root / "data/regime_w_rollouts.jsonl").read_bytes() != scored
    assert project.status() == {}
