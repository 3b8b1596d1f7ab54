"""A stage that is killed at any moment, any number of times, gives the bytes of an undisturbed run.

    python -m pytest tests/pipeline/test_kill.py --kills 20 -s     # 20 kills of each stage, and a line about each kill

Every kill is a SIGKILL, to the process or to its whole group. A seed draws the moments. They are spread over the
length of the undisturbed run, or follow an event: progress reached the disk, or a checkpoint, a selected adapter or the
temporary file of an output has just appeared. When a stage ends before it was killed often enough, its outputs are
removed, as DVC would do, and it starts again.

The tests only look at the files that a stage leaves: what was on the disk at one kill must be there, unchanged, at the
next.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.processes import holds, owner_of

if TYPE_CHECKING:
    from tests.pipeline.conftest import Project

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc to see what a stage does")

FEW = 3  # for more kills than this, the stages are made longer
POLL = 0.001  # seconds between two looks
PATIENCE = 600.0
TRAINED = ["adapter_config.json", "adapter_model.safetensors", "manifest.json"]


@dataclass(frozen=True)
class Case:
    """A stage to be killed: its command, its outputs, and the parameters that make it longer."""

    command: tuple[str, ...]
    work: str  # its folder in .work/
    outputs: tuple[str, ...]
    events: tuple[str, ...]  # a kill may follow when one of these files appears
    longer: dict[str, Any]
    always: dict[str, Any] = field(default_factory=dict)


CASES = {
    "evaluate": Case(
        ("evaluate", "sft"),
        ".work/evaluate@sft",
        (
            "data/platinum_eval/sft.jsonl",
            "data/platinum_eval/sft.manifest.json",
            "metrics/platinum/sft.json",
            "metrics/platinum_details/sft.json",
        ),
        ("data/platinum_eval/.*.tmp", "metrics/platinum*/.*.tmp"),
        {"evaluate.samples": 12, "hardware.generation_batch": 64},
    ),
    "rollout": Case(
        ("rollout",),
        ".work/rollout@dpo",
        ("data/rollouts/dpo.jsonl", "data/rollouts/dpo.manifest.json"),
        ("data/rollouts/.*.tmp",),
        {"rollout.questions": 120, "hardware.generation_batch": 64},
    ),
    "rollout by thompson": Case(
        ("rollout",),
        ".work/rollout@dpo",
        ("data/rollouts/dpo.jsonl", "data/rollouts/dpo.manifest.json"),
        ("data/rollouts/.*.tmp",),
        {"rollout.questions": 100},
        {"rollout.allocation": "thompson", "rollout.round_questions": 10},
    ),
    "sft": Case(
        ("sft",),
        ".work/sft",
        (
            "metrics/curves/sft.csv",
            "metrics/curves/sft_selection.csv",
            "metrics/kept/sft.json",
            *(f"checkpoints/sft_lora/{name}" for name in TRAINED),
        ),
        (
            ".work/sft/*/trainer/checkpoint-*",
            ".work/sft/*/selected/*",
            ".work/sft/*/selected/.*.tmp",
            "checkpoints/.*.tmp",
            "metrics/curves/.*.tmp",
        ),
        {"sft.epochs": 4, "sft.checkpoint_steps": 5},
    ),
    "dpo": Case(
        ("dpo",),
        ".work/dpo@dpo",
        (
            "metrics/curves/dpo.csv",
            "metrics/curves/dpo_selection.csv",
            "metrics/kept/dpo.json",
            *(f"checkpoints/dpo_coherence_lora/dpo/{name}" for name in TRAINED),
        ),
        (
            ".work/dpo@dpo/*/trainer/checkpoint-*",
            ".work/dpo@dpo/*/selected/*",
            ".work/dpo@dpo/*/selected/.*.tmp",
            "checkpoints/dpo_coherence_lora/.*.tmp",
            "metrics/curves/.*.tmp",
        ),
        {"dpo.epochs": 3, "dpo.checkpoint_steps": 4, "dpo.select.steps": 8},
    ),
}


@dataclass
class Undisturbed:
    """The undisturbed run of a case."""

    outputs: dict[str, bytes]
    before_work: float  # seconds from the start of the stage to its first progress on the disk
    work: float  # seconds from there to the end


@dataclass
class Series:
    """The result of killing one case repeatedly."""

    kills: list[tuple[str, float]] = field(default_factory=list)  # the moment, and the progress on the disk
    rounds: int = 0
    seconds: float = 0.0
    trouble: list[str] = field(default_factory=list)


def read_outputs(project: Project, case: Case) -> dict[str, bytes]:
    return {name: (project.root / name).read_bytes() for name in case.outputs}


class Progress:
    """The progress of a stage on the disk. `trouble` notes when some of it is lost or made a second time."""

    def __init__(self, project: Project, case: Case) -> None:
        self.folder = project.root / case.work
        self.journal = b""
        self.rounds: dict[str, bytes] = {}  # finished rounds of a rollout
        self.checkpoints: dict[int, tuple[int, int]] = {}  # step -> inode and time of its mark
        self.selected: list[Any] = []
        self.trouble: list[str] = []

    def size(self) -> tuple[int, int, int, int]:
        """Finished rounds, bytes of the journal, newest complete checkpoint, bytes of scored steps. It only grows."""
        rounds = list(self.folder.glob("*/batch-*.jsonl"))
        journals = [path.stat().st_size for path in self.folder.glob("*/journal.jsonl")]
        steps = self.look_at_checkpoints()
        chosen = [path.stat().st_size for path in self.folder.glob("*/selection.json")]
        return len(rounds), sum(journals), max(steps, default=0), sum(chosen)

    def look_at_checkpoints(self) -> list[int]:
        """The steps of all complete checkpoints. None may be made twice, because then steps were done again."""
        steps = []
        for mark in self.folder.glob("*/trainer/checkpoint-*/complete"):
            try:
                stat = mark.stat()
            except FileNotFoundError:  # the trainer has just removed it
                continue
            step = int(mark.parent.name.split("-")[1])
            stamp = (stat.st_ino, stat.st_mtime_ns)
            if self.checkpoints.setdefault(step, stamp) != stamp:
                self.trouble.append(f"checkpoint {step} was complete, and was made once more")
            steps.append(step)
        return steps

    def after_a_kill(self) -> float:
        """Compare with what the kill before left. Returns the bytes of the journal or the newest checkpoint's step."""
        rounds = {path.name: path.read_bytes() for path in self.folder.glob("*/batch-*.jsonl")}
        for path in self.folder.glob("*/journal.jsonl"):
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if path.parent.name == "gone":
                continue  # all is done, and the progress is being deleted
            if len(rounds) > len(self.rounds):  # a finished round moves from the journal to a file of its own
                stayed = texts(self.journal, {}).items() <= texts(whole, rounds).items()
            else:
                stayed = whole.startswith(self.journal)
            if not stayed:
                self.trouble.append(f"the journal of {len(self.journal)} bytes did not stay as it was")
            if any(rounds.get(name) != data for name, data in self.rounds.items()):
                self.trouble.append("a finished round did not stay as it was")
            ids = [json.loads(line)["record"]["id"] for line in whole.splitlines()]
            if len(ids) != len(set(ids)):
                self.trouble.append("a record is in the journal twice")
            self.journal, self.rounds = whole, rounds
        steps = self.look_at_checkpoints()
        if not progress_folders(self.folder):
            return 0.0  # all is done, and the progress is deleted
        if self.checkpoints and max(steps, default=0) < max(self.checkpoints):
            self.trouble.append(f"checkpoint {max(self.checkpoints)} was complete and is gone")
        for path in self.folder.glob("*/selection.json"):
            rows = json.loads(path.read_text())
            if rows[: len(self.selected)] != self.selected:
                self.trouble.append("steps scored on validation did not stay as they were")
            self.selected = rows
        return max([len(self.journal) + sum(map(len, self.rounds.values())), *steps])


def texts(journal: bytes, rounds: dict[str, bytes]) -> dict[str, str]:
    """The text of every trajectory in a journal and in finished rounds."""
    rows = [json.loads(line)["record"] for line in journal.splitlines()]
    for data in rounds.values():
        rows += [row for line in data.splitlines() for row in json.loads(line)["trajectories"]]
    return {row["id"]: row["text"] for row in rows}


def start(project: Project, case: Case, log: Path) -> subprocess.Popen[bytes]:
    """Start the stage in a process group of its own."""
    with log.open("ab") as stderr:
        return subprocess.Popen(
            ["python", "-m", "stages", *case.command],
            cwd=project.root,
            env=project.environment,
            stderr=stderr,
            start_new_session=True,
        )


def wait_for_start(process: subprocess.Popen[bytes], project: Project, case: Case) -> bool:
    """Wait until the stage has taken its lock, after its slow imports. Returns False when it ended before."""
    lock, until = (project.root / case.work / "lock").resolve(), time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if process.poll() is not None:
            return False
        if holds(process.pid, lock):
            return True
        time.sleep(0.01)
    process.kill()
    raise AssertionError(f"{case.command} did not take its lock in {PATIENCE:.0f} s")


def run_undisturbed(project: Project, case: Case, log: Path) -> Undisturbed:
    for name in case.outputs:
        (project.root / name).unlink()
    process, progress = start(project, case, log), Progress(project, case)
    assert wait_for_start(process, project, case), log.read_text()
    begun, empty, first = time.monotonic(), progress.size(), 0.0
    while process.poll() is None:
        if not first and progress.size() != empty:
            first = time.monotonic()
        time.sleep(0.01)
    assert process.returncode == 0, log.read_text()
    assert first, "no progress was seen on the disk"
    return Undisturbed(read_outputs(project, case), first - begun, time.monotonic() - first)


def moments(rng: random.Random, case: Case, alone: Undisturbed) -> Iterator[tuple[str, float, str]]:
    """Endless moments: what to wait for (start, progress, event), the seconds to wait after it, and its files."""
    while True:
        yield "progress", rng.uniform(0, alone.work / 5), ""
        yield "event", rng.choice([0.0, 0.002, 0.01]), rng.choice(case.events)
        for _ in range(3):
            yield "progress", rng.uniform(0, alone.work / 5), ""
        yield "start", rng.uniform(0, alone.before_work + alone.work / 2), ""


def kill_repeatedly(
    project: Project, case: Case, alone: Undisturbed, kills: int, seed: str, log: Path
) -> Series:
    """Kill a case `kills` times, and let it end after that."""
    rng, series, began = random.Random(seed), Series(), time.monotonic()
    wanted, progress = moments(rng, case, alone), Progress(project, case)
    remove_outputs(project, case)
    for _ in range(4 * kills + 4):
        process = start(project, case, log)
        if len(series.kills) < kills and wait_for_start(process, project, case):
            moment = next(wanted)
            if wait_for_moment(process, project, progress, moment):
                (os.killpg if rng.random() < 0.5 else os.kill)(process.pid, signal.SIGKILL)
        while process.poll() is None:
            progress.look_at_checkpoints()
            time.sleep(0.01)
        killed = process.returncode == -signal.SIGKILL
        if killed:
            series.kills.append((moment[2] or moment[0], progress.after_a_kill()))
        # If all outputs are there and the progress is deleted, the kill only hit a process that was leaving.
        outputs = [project.root / name for name in case.outputs]
        if killed and not (
            progress_folders(project.root / case.work) == [] and all(path.exists() for path in outputs)
        ):
            continue
        if process.returncode and not killed:
            series.trouble.append(f"ended with {process.returncode}: {log.read_text()[-2000:]}")
            break
        series.rounds += 1
        series.trouble += progress.trouble
        series.trouble += [
            f"{name} is not as undisturbed" for name, data in read_outputs(project, case).items()
            if data != alone.outputs[name]
        ]  # fmt: skip
        places = {project.root / Path(name).parent for name in case.outputs}
        left = [path for place in places for path in place.glob(".*.tmp")]
        left += [] if killed else progress_folders(project.root / case.work)
        series.trouble += [f"{path.relative_to(project.root)} was left" for path in left]
        if len(series.kills) == kills and not killed:
            break
        remove_outputs(project, case)
        progress = Progress(project, case)
    series.seconds = time.monotonic() - began
    return series


def progress_folders(work: Path) -> list[Path]:
    """The folders of half-done work. At its end a stage renames its own to `gone` and deletes it."""
    return [path for path in work.iterdir() if path.is_dir() and path.name != "gone"]


def remove_outputs(project: Project, case: Case) -> None:
    """Remove a case's outputs, as DVC does before it runs a stage."""
    for name in case.outputs:
        place = project.root / name
        if name.startswith("checkpoints/"):
            shutil.rmtree(place.parent, ignore_errors=True)
        else:
            place.unlink(missing_ok=True)


def wait_for_moment(
    process: subprocess.Popen[bytes], project: Project, progress: Progress, moment: tuple[str, float, str]
) -> bool:
    """Wait until the moment has come. Returns False when the process ended first."""
    kind, delay, pattern = moment
    before = set(project.root.glob(pattern)) if pattern else set()
    size, looked = progress.size(), 0.0
    until = time.monotonic() + PATIENCE
    while kind != "start" and time.monotonic() < until:
        if kind == "event" and set(project.root.glob(pattern)) - before:
            break
        if time.monotonic() - looked > 0.02:
            looked = time.monotonic()
            if process.poll() is not None:
                return False
            if progress.size() > size and kind == "progress":
                break
        time.sleep(POLL)
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        return True
    return False


@pytest.mark.parametrize("name", CASES)
def test_killed_again_and_again_it_gives_the_same_bytes(
    name: str, copy_run: Callable[[], Project], tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """Nothing is lost or made twice, every output is as undisturbed, and no temporary file is left."""
    project, case, kills = copy_run().cold, CASES[name], pytestconfig.getoption("--kills")
    changes = case.always | (case.longer if kills > FEW else {})
    if changes:
        project.update("profiles/tiny.yaml", changes)
        alone = run_undisturbed(project, case, tmp_path / "alone.log")
    else:
        # The small run was undisturbed. Its times are not known, but on most machines they are some seconds.
        alone = Undisturbed(read_outputs(project, case), 1.0, 3.0)
    result = kill_repeatedly(project, case, alone, kills, seed=name, log=tmp_path / "log")
    print(f"\n{name}: {len(result.kills)} kills, {result.rounds} rounds, {result.seconds:.0f} s")
    for why, reached in result.kills:
        print(f"  {why:40} {reached:,.0f}")
    assert not result.trouble, result.trouble
    assert len(result.kills) == kills
    assert result.rounds >= 1
    reached = {reached for _, reached in result.kills}
    assert len(reached) > kills / 4, f"the kills did not spread over the run: {reached}"


@pytest.mark.parametrize("stage", ["rollout@dpo", pytest.param("sft", marks=pytest.mark.slow)])
def test_killing_dvc_ends_its_stage_and_the_next_repro_goes_on(
    stage: str, small_run: Project, copy_run: Callable[[], Project]
) -> None:
    """After SIGKILL to dvc alone, no orphan trains or generates on, and what was done stays done."""
    project, case = copy_run().cold, CASES[stage.partition("@")[0]]
    wanted = read_outputs(small_run, case)
    command = ["dvc", "repro", "--single-item", "--no-run-cache", stage]
    progress = Progress(project, case)
    dvc = subprocess.Popen([*command, "--force"], cwd=project.root, env=project.environment)
    lock, until = project.root / case.work / "lock", time.monotonic() + PATIENCE
    trainer = None
    while dvc.poll() is None and trainer is None and time.monotonic() < until:
        time.sleep(POLL)
        trainer = owner_of(lock)
    assert trainer is not None
    assert trainer != dvc.pid
    while dvc.poll() is None and not any(progress.size()) and time.monotonic() < until:
        time.sleep(POLL)
    # Stop it while dvc dies, because otherwise it may finish before it looks for its parent.
    os.kill(trainer, signal.SIGSTOP)
    dvc.kill()
    assert dvc.wait() == -signal.SIGKILL
    time.sleep(1)
    os.kill(trainer, signal.SIGCONT)
    ended = time.monotonic() + 60
    while owner_of(lock) == trainer:
        assert time.monotonic() < ended, f"the stage went on without dvc, as process {trainer}"
        time.sleep(0.05)
    progress.after_a_kill()
    assert not [name for name in case.outputs if (project.root / name).exists()]
    again = project.run(*command, "--force")  # without --force DVC may take the outputs from its cache
    assert f"Running stage '{stage}'" in again.stdout
    assert read_outputs(project, case) == wanted
    assert progress.trouble == []
    assert project.run("dvc", "status", stage).stdout.strip() == "Data and pipelines are up to date."
