"""Several processes on one host give what one process gives: the same trajectories, and adapters up to rounding."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from tests.processes import arguments, children

if TYPE_CHECKING:
    from tests.pipeline.conftest import Project

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def project(copy_run: Callable[[], Project]) -> Project:
    """The small run with two processes and gradient checkpointing. DVC sees no change."""
    copy = copy_run().cold
    hardware = {"processes": 2, "generation_batch": 64, "gradient_checkpointing": True}
    copy.update("profiles/tiny.yaml", {f"hardware.{key}": value for key, value in hardware.items()})
    assert copy.status() == {}
    return copy


def test_training_in_two_processes(
    project: Project, small_run: Project, assert_same_adapter: Callable[[str, Project, Project], None]
) -> None:
    """Each process takes half of the global batch. tests/launch/test_training.py does the same with SFT."""
    done = project.stages("dpo")
    assert_same_adapter("dpo", small_run, project)
    roots = (small_run.root, project.root)
    wanted, found = ((root / "metrics/curves/dpo.csv").read_text().splitlines() for root in roots)
    assert len(wanted) == len(found)
    assert done.stderr.count("parameters trained") == 1  # only one process prints


def test_generation_in_two_processes(project: Project, small_run: Project) -> None:
    """The same bytes, because each piece is a batch of a single process."""
    alone = project.root.parent / "alone"
    project.run("git", "checkout", "--quiet", "--", ".")
    project.run("dvc", "checkout", "--force", "--quiet")
    for processes, keep in ((1, alone), (2, None)):
        project.update(
            "profiles/tiny.yaml", {"hardware.processes": processes, "hardware.generation_batch": 64}
        )
        project.stages("rollout")
        if keep:
            keep.write_bytes((project.root / "data/rollouts/dpo.jsonl").read_bytes())
    assert (project.root / "data/rollouts/dpo.jsonl").read_bytes() == alone.read_bytes()


def test_a_killed_process_costs_its_piece_only(project: Project) -> None:
    """Another process does its piece again, and the result is the same."""
    wanted = (project.root / "data/rollouts/dpo.jsonl").read_bytes()
    stage = subprocess.Popen(
        ["python", "-m", "stages", "rollout"],
        cwd=project.root,
        env=project.environment,
        stderr=subprocess.PIPE,
    )
    workers: list[int] = []
    lines = 0
    deadline = time.monotonic() + 120
    while stage.poll() is None and (len(workers) < 2 or lines < 20) and time.monotonic() < deadline:
        workers = workers if len(workers) == 2 else workers_of(stage.pid)
        journals = list((project.root / ".work/rollout@dpo").glob("*/journal.jsonl"))
        lines = journals[0].read_bytes().count(b"\n") if journals else 0
        time.sleep(0.001)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    _, said = stage.communicate(timeout=300)
    assert stage.returncode == 0, said
    assert (project.root / "data/rollouts/dpo.jsonl").read_bytes() == wanted


def workers_of(pid: int) -> list[int]:
    """The processes in which a stage generates."""
    return [child for child in children(pid) if any("spawn_main" in word for word in arguments(child))]
