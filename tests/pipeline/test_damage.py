"""Real stages on full, read-only and damaged disks: the result is right, or one line says why not.

tests/run/test_journal.py damages journals byte by byte.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.pipeline.conftest import Project

EVALUATED = (
    "data/platinum_eval/sft.jsonl",
    "data/platinum_eval/sft.manifest.json",
    "metrics/platinum/sft.json",
    "metrics/platinum_details/sft.json",
)
TRAINED = (
    "checkpoints/sft_lora/adapter_model.safetensors",
    "checkpoints/sft_lora/adapter_config.json",
    "checkpoints/sft_lora/manifest.json",
    "metrics/curves/sft.csv",
)


def bytes_of(project: Project, names: Iterable[str]) -> dict[str, bytes]:
    return {name: (project.root / name).read_bytes() for name in names}


def ended_in_one_line(done: subprocess.CompletedProcess[str], words: str) -> None:
    """Exit status 1 and one line, `error: ...`, with these words in it."""
    assert done.returncode == 1, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert words in errors[0]
    assert "Traceback" not in done.stderr


def test_ended_and_damaged(small_run: Project, copy_run: Callable[[], Project]) -> None:
    """An evaluation is ended by SIGTERM and has its journal damaged, and still comes out the same."""
    project = copy_run().cold
    wanted = bytes_of(small_run, EVALUATED)
    for name in EVALUATED:
        (project.root / name).unlink()
    process = subprocess.Popen(
        ["python", "-m", "stages", "evaluate", "sft"], cwd=project.root, env=project.environment
    )
    work = project.root / ".work/evaluate@sft"
    while not (some := [path for path in work.glob("*/journal.jsonl") if path.stat().st_size > 4000]):
        assert process.poll() is None, "it ended before anything was in the journal"
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    (journal,) = some
    lines = journal.read_bytes().splitlines(keepends=True)
    assert all(line.endswith(b"\n") for line in lines), "SIGTERM leaves whole lines"
    for n in (0, len(lines) // 2, len(lines) - 1):
        lines[n] = lines[n].replace(b'"text"', b'"Text"')
    journal.write_bytes(b"".join(lines))
    done = project.stages("evaluate", "sft")
    assert "3 damaged records of an earlier run set aside" in done.stderr
    assert bytes_of(project, EVALUATED) == wanted
    assert not journal.exists()


@contextlib.contextmanager
def small_disk(place: Path, kilobytes: int) -> Iterator[Path]:
    """A file system of this size at `place`, with the files that were there. Skips where mounting is not allowed."""
    inside = place.parent / f"{place.name}.before"
    place.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)]
    shutil.copytree(place, inside, symlinks=True)
    if sys.platform != "linux" or subprocess.run(command, capture_output=True, check=False).returncode:
        shutil.rmtree(inside)
        pytest.skip("a small file system to fill up cannot be mounted here (that needs root)")
    try:
        shutil.copytree(inside, place, symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(inside)
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path, left: int) -> Path:
    """Fill a file system up to `left` bytes; returns the file to remove."""
    filler = disk / "filler"
    room = shutil.disk_usage(disk).free - left
    with filler.open("wb") as file:
        file.write(bytes(room))
    return filler


def test_evaluate_on_a_full_disk(small_run: Project, copy_run: Callable[[], Project]) -> None:
    """First there is no room for the journal, then none for the rows, then there is room."""
    project = copy_run()
    wanted = bytes_of(small_run, EVALUATED)
    for name in EVALUATED:
        (project.root / name).unlink()
    with (
        small_disk(project.root / ".work", 8192) as work,
        small_disk(project.root / "data/platinum_eval", 8192) as data,
    ):
        filler, other = fill(work, 24_000), fill(data, 8_000)
        ended_in_one_line(project.stages("evaluate", "sft", check=False), "No space left on device")
        (journal,) = work.glob("evaluate@sft/*/journal.jsonl")
        kept = journal.read_bytes()
        assert kept.count(b"\n") > 20
        filler.unlink()
        ended_in_one_line(
            project.stages("evaluate", "sft", check=False), "sft.jsonl: cannot be written (No space left"
        )
        assert journal.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
        assert not list(data.glob(".*.tmp"))
        finished = journal.stat()
        other.unlink()
        project.stages("evaluate", "sft")
        assert finished.st_size > len(kept)
        assert bytes_of(project, EVALUATED) == wanted


def test_training_on_a_full_disk(small_run: Project, copy_run: Callable[[], Project]) -> None:
    """First there is no room for the second checkpoint, then none for the adapter, then there is room."""
    project = copy_run()
    wanted = bytes_of(small_run, TRAINED)
    shutil.rmtree(project.root / "checkpoints/sft_lora")
    with (
        small_disk(project.root / ".work", 32_768) as work,
        small_disk(project.root / "checkpoints", 32_768) as kept,
    ):
        size = sum(path.stat().st_size for path in (small_run.root / "checkpoints/sft_lora").iterdir())
        # Step 0's adapter and a checkpoint of four adapters fit, a second checkpoint does not.
        filler, other = fill(work, 6 * size), fill(kept, size // 2)
        ended_in_one_line(project.stages("sft", check=False), "the disk is full")
        complete = sorted(path.parent.name for path in work.glob("sft/*/trainer/*/complete"))
        assert complete == ["checkpoint-10"]
        filler.unlink()
        ended_in_one_line(project.stages("sft", check=False), "the disk is full")
        assert not (kept / "sft_lora").exists()
        assert not list(kept.glob(".*.tmp"))
        assert "checkpoint-30" in {path.parent.name for path in work.glob("sft/*/trainer/*/complete")}
        other.unlink()
        project.stages("sft")
        assert bytes_of(project, TRAINED) == wanted


def test_outputs_that_cannot_be_written_are_found_before_the_work(copy_run: Callable[[], Project]) -> None:
    """A read-only file system."""
    project = copy_run()
    with small_disk(project.root / "checkpoints", 32_768) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        ended_in_one_line(
            project.stages("sft", check=False), "checkpoints/sft_lora: cannot be written; check what "
        )
        assert not list((project.root / ".work/sft").glob("*/trainer"))
