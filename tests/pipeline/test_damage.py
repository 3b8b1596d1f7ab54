"""Whatever happens to a disk, the result is right or there is one clear line; damage is never believed.

The first part damages journals in every way a disk can, with a stand-in for the model; the second runs real
stages into full disks, damage and rivals.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from stages.core.generation import complete
from stages.core.records import Journal, write_jsonl
from stages.engine.base import Completion, Request
from tests.processes import holds

if TYPE_CHECKING:
    from tests.pipeline.conftest import Project

REQUESTS = [Request(f"train-{n:05}/{k}", (n, k), 20) for n in range(3) for k in range(2)]
IDS = [request.id for request in REQUESTS]


class Engine:
    """Writes a text that follows from the request, and notes what it was asked for."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def generate(
        self, requests: Iterable[Request], done: frozenset[str] = frozenset()
    ) -> Iterator[Completion]:
        for request in sorted(requests, key=lambda request: request.prompt[::-1]):  # not in their order
            if request.id not in done:
                self.made.append(request.id)
                yield Completion(request.id, request.prompt, "stop", -sum(request.prompt) / 3)


class Tokenizer:
    def decode(self, tokens: Iterable[int], skip_special_tokens: bool) -> str:
        return "".join(f"Für {token} <<{token}+1={token + 1}>>\n" for token in tokens)


def run(folder: Path) -> tuple[bytes, list[str], int]:
    """A stage's generation: the output's bytes, the ids that were made now, damaged pieces found."""
    engine, out = Engine(), folder / "out.jsonl"
    with Journal(folder / "journal.jsonl") as journal:
        completions = complete(engine, Tokenizer(), REQUESTS, journal, lambda *_: None)
        write_jsonl(out, [completions[request.id] for request in REQUESTS])
        return out.read_bytes(), engine.made, journal.damaged


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """Output and journal of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    output, made, damaged = run(folder)
    assert sorted(made) == IDS
    assert damaged == 0
    return output, (folder / "journal.jsonl").read_bytes()


@pytest.fixture
def resumed(
    tmp_path: Path, undisturbed: tuple[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> Callable[[bytes], tuple[set[str], int]]:
    """Resumes from a journal; checks the output, and that the journal is whole afterwards."""
    monkeypatch.setattr(
        os, "fsync", lambda handle: None
    )  # no power is cut here, and it takes most of the time

    def resume(journal: bytes) -> tuple[set[str], int]:
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        path, aside = tmp_path / "journal.jsonl", tmp_path / "journal.jsonl.damaged"
        path.write_bytes(journal)
        output, made, damaged = run(tmp_path)
        assert output == undisturbed[0]
        assert len(made) == len(set(made))
        assert (damaged > 0) == aside.exists()
        if damaged:
            pieces = aside.read_bytes().splitlines()
            assert len(pieces) >= damaged
            assert all(piece in journal for piece in pieces)
        assert sorted(json.loads(line)["record"]["id"] for line in path.read_bytes().splitlines()) == IDS
        assert run(tmp_path) == (undisturbed[0], [], 0)
        return set(made), damaged

    return resume


Resumed = Callable[[bytes], tuple[set[str], int]]


def lines_of(journal: bytes) -> list[bytes]:
    return journal.splitlines(keepends=True)


def id_of(line: bytes) -> str:
    return line.split(b'"id": "')[1][:13].decode()


WHICH = pytest.mark.parametrize("which", [0, 3, 5], ids=["first", "middle", "last"])


@WHICH
def test_a_byte_flipped(which: int, undisturbed: tuple[bytes, bytes], resumed: Resumed) -> None:
    """At every place of a line: its beginning, the checksum, the record, the end of the line itself."""
    lines = lines_of(undisturbed[1])
    start, line = len(b"".join(lines[:which])), lines[which]
    rng = random.Random(which)
    for place in range(len(line)):
        mask = 1 << rng.randrange(8)
        flipped = bytearray(undisturbed[1])
        flipped[start + place] ^= mask
        made, damaged = resumed(bytes(flipped))
        hit = {id_of(line)}
        if place < len(line) - 1:
            assert (made, damaged > 0) == (hit, True), (place, mask)
        elif which == 5:  # without its end, the last line is one that was not written to its end
            assert made == hit
        else:  # without the end between them, two lines are one
            assert (made, damaged) == (hit | {id_of(lines[which + 1])}, 1)


@WHICH
@pytest.mark.parametrize("byte", [b"x", b"\n", b'"', b"\0", b"\xff"])
def test_a_byte_inserted(which: int, byte: bytes, undisturbed: tuple[bytes, bytes], resumed: Resumed) -> None:
    lines = lines_of(undisturbed[1])
    line = lines[which]
    for place in {*range(0, len(line), 3), len(line) - 1}:
        lines[which] = line[:place] + byte + line[place:]
        made, damaged = resumed(b"".join(lines))
        if byte == b"\n" and place in (0, len(line) - 1):  # an empty line: nothing is lost
            assert made == set()
        else:
            assert (made, damaged > 0) == ({id_of(line)}, True), place


@WHICH
def test_a_byte_deleted(which: int, undisturbed: tuple[bytes, bytes], resumed: Resumed) -> None:
    lines = lines_of(undisturbed[1])
    line = lines[which]
    for place in range(len(line) - 1):
        lines[which] = line[:place] + line[place + 1 :]
        made, damaged = resumed(b"".join(lines))
        # A blank between two parts says nothing: without it the record is what it was.
        assert made == (set() if line[place : place + 1] == b" " and not damaged else {id_of(line)}), place


def test_cut_off_anywhere(undisturbed: tuple[bytes, bytes], resumed: Resumed) -> None:
    """What a kill leaves: whole lines, and a part of one. That part is no damage, and no more is lost."""
    journal = undisturbed[1]
    for length in range(0, len(journal), 7):
        whole = journal[: journal[:length].rfind(b"\n") + 1]
        made, damaged = resumed(journal[:length])
        assert made == set(IDS) - {id_of(line) for line in lines_of(whole)}
        assert damaged == 0


def test_lines_doubled_or_in_another_order(undisturbed: tuple[bytes, bytes], resumed: Resumed) -> None:
    """Every line stands for itself. A record that is there twice counts once."""
    lines = lines_of(undisturbed[1])
    assert resumed(b"".join(reversed(lines))) == (set(), 0)
    assert resumed(b"".join([*lines[:2], *lines[3:], lines[2]])) == (set(), 0)


def test_a_line_is_lost(undisturbed: tuple[bytes, bytes], resumed: Resumed) -> None:
    lines = lines_of(undisturbed[1])
    for n, line in enumerate(lines):
        assert resumed(b"".join(lines[:n] + lines[n + 1 :])) == ({id_of(line)}, 0)


def test_two_records_swap_their_checksums(undisturbed: tuple[bytes, bytes], resumed: Resumed) -> None:
    """A checksum is that of its own line."""
    lines = lines_of(undisturbed[1])
    head = len(b'{"sum": "01234567"')
    lines[1], lines[2] = lines[2][:head] + lines[1][head:], lines[1][:head] + lines[2][head:]
    assert resumed(b"".join(lines)) == ({id_of(lines[1]), id_of(lines[2])}, 2)


@pytest.mark.parametrize(
    ("change", "lost", "damaged"),
    [
        (lambda data: b"", 6, 0),
        (lambda data: bytes(len(data)), 6, 1),  # the length is on the disk, the data is not
        (lambda data: data + bytes(4096), 0, 1),
        (lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2), 3, 1),
        (lambda data: bytes(10) + data[10:], 1, 1),
        (lambda data: b"[" * 100_000 + b"\n" + data, 0, 1),
        (lambda data: b"\xff\xfe" + data.decode().encode("utf-16-le"), 6, 1),
        (lambda data: data.replace(b"\n", b"\r\n"), 0, 0),  # an editor's doing; the records are whole
    ],
    ids=["emptied", "all zeros", "zeros behind", "zeros from the middle", "zeros at the beginning",
         "brackets", "other encoding", "other line ends"],
)  # fmt: skip
def test_what_a_power_cut_or_an_editor_leaves(
    change: Callable[[bytes], bytes],
    lost: int,
    damaged: int,
    undisturbed: tuple[bytes, bytes],
    resumed: Resumed,
) -> None:
    made, found = resumed(change(undisturbed[1]))
    assert len(made) == lost
    assert (found > 0) == (damaged > 0)


# ---- real stages -------------------------------------------------------------------------------------

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
ROLLED = ("data/rollouts.jsonl", "data/rollouts.manifest.json")


def bytes_of(project: Project, names: Iterable[str]) -> dict[str, bytes]:
    return {name: (project.root / name).read_bytes() for name in names}


def ended_in_one_line(done: subprocess.CompletedProcess[str], words: str) -> None:
    """Exit status 1 and one line, `error: ...`, with these words in it."""
    assert done.returncode == 1, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert words in errors[0]
    assert "Traceback" not in done.stderr


def terminate_when_some_is_done(process: subprocess.Popen[str], folder: Path, size: int) -> Path:
    """SIGTERM once the journal holds `size` bytes; returns the journal."""
    until = time.monotonic() + 600
    while time.monotonic() < until:
        for journal in folder.glob("*/journal.jsonl"):
            if journal.stat().st_size >= size:
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 143, process.stderr.read() if process.stderr else ""
                return journal
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.002)
    process.kill()
    raise AssertionError("nothing came into the journal in 10 minutes")


def test_ended_damaged_and_with_a_rival(small_run: Project, copy_run: Callable[[], Project]) -> None:
    """One evaluation: ended by SIGTERM under other parameters, then with its own, a rival, damage; and its end."""
    project = copy_run()
    wanted = bytes_of(small_run, EVALUATED)
    for name in EVALUATED:
        (project.root / name).unlink()
    work = project.root / ".work/evaluate@sft"

    def start() -> subprocess.Popen[str]:
        command = ["python", "-m", "stages", "evaluate", "sft"]
        return subprocess.Popen(
            command, cwd=project.root, env=project.environment, stderr=subprocess.PIPE, text=True
        )

    # Progress made under another temperature.
    project.update("profiles/tiny.yaml", {"evaluate.temperature": 0.3})
    strange = terminate_when_some_is_done(start(), work, 4000)
    assert len(strange.read_bytes().splitlines()) > 10

    # With its own temperature nothing of it is used; what is done until SIGTERM stays.
    project.update("profiles/tiny.yaml", {"evaluate.temperature": 0.9})
    process = start()
    while process.poll() is None and not holds(process.pid, (work / "lock").resolve()):
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)  # else it may be done before its rival has started
    try:
        rival = project.stages("evaluate", "sft", check=False)
    finally:
        process.send_signal(signal.SIGCONT)
    ended_in_one_line(rival, "another run of this stage is going on")
    journal = terminate_when_some_is_done(process, work, 4000)
    assert journal.parent.name != strange.parent.name
    assert not strange.exists()
    lines = journal.read_bytes().splitlines(keepends=True)
    assert all(line.endswith(b"\n") for line in lines), "SIGTERM leaves no half a line"

    # Three of its records damaged.
    for n in (0, len(lines) // 2, len(lines) - 1):
        lines[n] = lines[n].replace(b'"text"', b'"Text"')
    journal.write_bytes(b"".join(lines))
    done = project.stages("evaluate", "sft")
    assert "3 damaged records of an earlier run set aside" in done.stderr
    assert bytes_of(project, EVALUATED) == wanted
    assert not journal.exists()


@contextlib.contextmanager
def small_disk(place: Path, kilobytes: int) -> Iterator[Path]:
    """A file system of this size at `place`, with what was there; skips where mounting is not allowed."""
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
    """First no room for the journal, then none for the rows; then there is room."""
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


def test_rollout_on_a_full_disk(small_run: Project, copy_run: Callable[[], Project]) -> None:
    project = copy_run()
    wanted = bytes_of(small_run, ROLLED)
    for name in ROLLED:
        (project.root / name).unlink()
    with small_disk(project.root / ".work", 8192) as work:
        filler = fill(work, 40_000)
        ended_in_one_line(project.stages("rollout", check=False), "No space left on device")
        assert next(work.glob("rollout/*/journal.jsonl")).read_bytes().count(b"\n") > 20
        filler.unlink()
        project.stages("rollout")
        assert bytes_of(project, ROLLED) == wanted


def test_training_on_a_full_disk(small_run: Project, copy_run: Callable[[], Project]) -> None:
    """No room for the second checkpoint; then none for the adapter; then there is room."""
    project = copy_run()
    wanted = bytes_of(small_run, TRAINED)
    shutil.rmtree(project.root / "checkpoints/sft_lora")
    with (
        small_disk(project.root / ".work", 32_768) as work,
        small_disk(project.root / "checkpoints", 32_768) as kept,
    ):
        size = sum(path.stat().st_size for path in (small_run.root / "checkpoints/sft_lora").iterdir())
        filler, other = fill(work, 4 * size), fill(kept, size // 2)
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


def test_outputs_that_cannot_be_written_are_found_before_the_work(
    small_run: Project, copy_run: Callable[[], Project]
) -> None:
    """A file system that is read-only; and a file where a folder should be."""
    project = copy_run()
    shutil.rmtree(project.root / "metrics/platinum")
    (project.root / "metrics/platinum").write_text("")
    done = project.stages("evaluate", "sft", check=False)
    ended_in_one_line(done, "metrics/platinum/sft.json: cannot be written; check what ")
    assert not list((project.root / ".work/evaluate@sft").glob("*/journal.jsonl"))
    with small_disk(project.root / "checkpoints", 32_768) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        ended_in_one_line(
            project.stages("sft", check=False), "checkpoints/sft_lora: cannot be written; check what "
        )
        assert not list((project.root / ".work/sft").glob("*/trainer"))
