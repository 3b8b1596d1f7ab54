"""The journal of finished records: it survives kills and full disks, and damage is found, never believed.

The second part damages a journal in every way a disk can, and lets a stage's generation go on from it, with a stand-in
for the model.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from stages.policy.complete import complete
from stages.policy.request import Completion, Request
from stages.run.errors import UserError
from stages.run.files import write_jsonl
from stages.run.journal import Journal


def reopened(path: Path) -> tuple[list[dict[str, object]], int]:
    """The records of a journal, and the number of damaged lines."""
    with Journal(path) as journal:
        return list(journal.records.values()), journal.damaged


def test_records_come_back_as_they_were_added(tmp_path: Path) -> None:
    """More can be added later. A record that is written twice counts once."""
    path = tmp_path / "work" / "j.jsonl"
    rows: list[dict[str, object]] = [{"id": f"q{i}", "text": "ünï\n", "logprob": -0.1 * i} for i in range(3)]
    for row in rows:
        with Journal(path) as journal:
            journal.add(row)
    assert reopened(path) == (rows, 0)
    path.write_bytes(path.read_bytes() * 2)
    assert reopened(path) == (rows, 0)


def test_full_disk_is_one_line(tmp_path: Path) -> None:
    """Whichever call finds that the journal can no longer be written, the message is the same."""
    path = tmp_path / "j.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))  # acts like a disk that fills up
    try:
        with (
            pytest.raises(UserError, match=r"j\.jsonl: cannot be written \(.*free some room"),
            Journal(path) as full,
        ):
            for n in range(1000):
                full.add({"id": f"q{n}", "text": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    kept, damaged = reopened(path)
    assert len(kept) > 20 and damaged == 0
    assert [row["id"] for row in kept] == [f"q{n}" for n in range(len(kept))]


# ---- Damage ------------------------------------------------------------------------------------------

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
    """Generate as a stage does; returns the output's bytes, the ids made by this call, and damaged lines found."""
    engine, out = Engine(), folder / "out.jsonl"
    with Journal(folder / "journal.jsonl") as journal:
        completions = complete(engine, Tokenizer(), REQUESTS, journal, lambda *_: None)
        write_jsonl(out, [completions[request.id] for request in REQUESTS])
        return out.read_bytes(), engine.made, journal.damaged


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """Output and journal of an undisturbed run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    output, made, damaged = run(folder)
    assert sorted(made) == IDS
    assert damaged == 0
    return output, (folder / "journal.jsonl").read_bytes()


@pytest.fixture
def resumed(
    tmp_path: Path, undisturbed: tuple[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> Callable[[bytes], tuple[set[str], int]]:
    """A function that resumes from a journal, and checks the output and that the journal is whole afterwards.

    It returns the ids that were made again, and how many damaged lines were found.
    """
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # it would take most of the time

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
def test_a_flipped_byte(which: int, undisturbed: tuple[bytes, bytes], resumed: Resumed) -> None:
    """At every place of a line, the line end included."""
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
def test_an_inserted_byte(
    which: int, byte: bytes, undisturbed: tuple[bytes, bytes], resumed: Resumed
) -> None:
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
def test_a_deleted_byte(which: int, undisturbed: tuple[bytes, bytes], resumed: Resumed) -> None:
    lines = lines_of(undisturbed[1])
    line = lines[which]
    for place in range(len(line) - 1):
        lines[which] = line[:place] + line[place + 1 :]
        made, damaged = resumed(b"".join(lines))
        # Without a blank between two parts the record is still the same.
        assert made == (set() if line[place : place + 1] == b" " and not damaged else {id_of(line)}), place


def test_cut_off_anywhere(undisturbed: tuple[bytes, bytes], resumed: Resumed) -> None:
    """A kill leaves whole lines and a part of one. That part is not damage, and nothing else is lost."""
    journal = undisturbed[1]
    for length in range(0, len(journal), 7):
        whole = journal[: journal[:length].rfind(b"\n") + 1]
        made, damaged = resumed(journal[:length])
        assert made == set(IDS) - {id_of(line) for line in lines_of(whole)}
        assert damaged == 0


def test_lines_missing_or_in_another_order(undisturbed: tuple[bytes, bytes], resumed: Resumed) -> None:
    """The order of the lines does not matter."""
    lines = lines_of(undisturbed[1])
    assert resumed(b"".join(reversed(lines))) == (set(), 0)
    assert resumed(b"".join([*lines[:2], *lines[3:], lines[2]])) == (set(), 0)
    for n, line in enumerate(lines):
        assert resumed(b"".join(lines[:n] + lines[n + 1 :])) == ({id_of(line)}, 0)


def test_two_records_swap_their_checksums(undisturbed: tuple[bytes, bytes], resumed: Resumed) -> None:
    """Both records are damaged then."""
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
