"""A queue of experiments, from start to table, and trackers that watch a training: on copies of the small run."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.pipeline.conftest import Project

pytestmark = pytest.mark.pipeline

DVC = str(Path(sys.executable).parent / "dvc")
# What TensorBoard's callback of transformers writes with, where tensorboard itself is not installed.
WRITER = """
from pathlib import Path

class SummaryWriter:
    def __init__(self, log_dir):
        Path(log_dir).mkdir(parents=True)
        self.file = (Path(log_dir) / "scalars").open("w")

    def add_scalar(self, name, value, step):
        self.file.write(f"{step} {name} {value}\\n")

    def __getattr__(self, name):
        return lambda *args, **words: None
"""


@pytest.fixture
def watched(copy_run: Callable[[], Project]) -> Project:
    """A copy of the small run whose Python has a tensorboardX."""
    project = copy_run().cold
    (project.guard / "tensorboardX.py").write_text(WRITER, encoding="utf-8")
    with (project.guard / "sitecustomize.py").open("a", encoding="utf-8") as file:
        file.write("import sys; sys.modules['torch.utils.tensorboard'] = None\n")
    return project


def curves(project: Project) -> dict[str, str]:
    """What the trackers wrote, by the name of the training."""
    return {
        path.parent.name: path.read_text(encoding="utf-8")
        for path in project.root.glob(".work/trackers/tensorboard/*/scalars")
    }


def test_a_watched_training_gives_the_same_bytes(watched: Project) -> None:
    """The curve is in .work/ alone, and nothing is out of date, with the variable or without it."""
    before = (watched.root / "dvc.lock").read_bytes()
    watched.run("dvc", "repro", "--force", "--single-item", "sft", LOOPER_TRACKERS="tensorboard")
    assert (watched.root / "dvc.lock").read_bytes() == before
    (written,) = curves(watched).items()
    assert re.fullmatch(r"sft-[0-9a-f]{8}", written[0])
    assert re.search(r"^1 train/loss [0-9.]+$", written[1], re.MULTILINE)
    assert not watched.run("git", "status", "--porcelain").stdout
    assert watched.status() == watched.status(LOOPER_TRACKERS="tensorboard") == {}
    assert not (watched.guard / "attempts").exists()


@pytest.mark.slow
def test_a_queue_of_four_from_start_to_table(watched: Project, tmp_path: Path) -> None:
    """Where python3 is not the environment's, without a network, and with a tracker. Platinum is for the chosen one."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python3").symlink_to(Path(sys.base_prefix) / "bin/python3")  # lacks what the stages need
    (programs / "dvc").symlink_to(DVC)  # the queue's worker is the `dvc` of the PATH
    if sys.prefix != sys.base_prefix:
        (watched.root / ".venv").symlink_to(sys.prefix)
    path = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "LOOPER_TRACKERS": "tensorboard"}
    values = "profiles/tiny.yaml:dpo.learning_rate=1e-4,6e-4", "profiles/tiny.yaml:dpo.beta=0.2,0.3"
    flags = [part for value in values for part in ("-S", value)]
    queued = watched.run("dvc", "exp", "run", "--queue", *flags, "dpo", **path).stdout
    names = re.findall(r"Queued experiment '(\S+)'", queued)
    assert len(names) == 4
    watched.run("dvc", "exp", "run", "--run-all", "-j", "1", **path)
    assert watched.run("dvc", "queue", "status").stdout.count("Success") == 4
    assert "Running stage 'dpo@dpo'" in watched.run("dvc", "queue", "logs", names[0]).stdout
    watched.run("dvc", "exp", "run", "--queue", "-S", "profiles/tiny.yaml:dpo.beta=0.4", "dpo")
    watched.run("dvc", "exp", "run", "-n", "whole", "-S", "headline.policy=sft")

    shown = watched.stages("results", "--experiments").stdout
    first = {line.split()[0] for line in shown.splitlines() if line.strip()}
    assert first > {*names, "whole"}
    scores = [float(found) for found in re.findall(r"([0-9.]+) % +\+", shown)]
    assert scores == sorted(scores, reverse=True) and len(scores) == 5
    assert "6 tried (5 success, 1 queued)" in shown
    assert "The best of 5 is partly the luckiest" in shown and "on 15 questions" in shown
    assert shown.count("dpo.beta: 0.2") == shown.count("dpo.beta: 0.3") == 2
    assert shown.count("dpo.learning_rate: 0.0006") == 2 and "headline.policy: sft" in shown
    assert "Platinum" not in shown

    assert (
        f"{names[0]} was not evaluated on Platinum"
        in watched.stages("results", "--experiments", names[0]).stdout
    )
    chosen = watched.stages("results", "--experiments", "whole").stdout
    assert re.search(r"whole, chosen of 6, on Platinum: greedy [0-9.]+ % \(.*\), mean@4 [0-9.]+ %", chosen)
    unknown = watched.stages("results", "--experiments", "hole", check=False)
    assert unknown.stderr.startswith("error: no experiment 'hole'; the nearest") and unknown.returncode == 1

    watched.run("dvc", "exp", "apply", names[0])
    stale = watched.status().keys()
    assert "evaluate@dpo" in stale and "dpo@dpo" not in stale
    assert sum("dpo@dpo" in name for name in curves(watched)) == 4
    assert not (watched.guard / "attempts").exists()
