"""Pieces of work among workers that die, hang or come late: nothing is lost, nothing is done twice."""

from __future__ import annotations

import random
from typing import Any

import pytest

from stages.engine import handout
from stages.engine.handout import ATTEMPTS, HandOut, Piece
from stages.policy.request import Completion, Request
from stages.run.errors import UserError
from stages.run.params import Hardware

REQUESTS = [Request(str(place), (1,) * (1 + place % 7), 5) for place in range(100)]


def hand_out(done: frozenset[str] = frozenset(), workers: int = 2, **changed: Any) -> HandOut:
    values: dict[str, Any] = {
        "threads": 1,
        "processes": 2,
        "engine": "auto",
        "generation_batch": 8,
        "per_device_batch": 1,
        "gradient_checkpointing": False,
    }
    return HandOut(REQUESTS, done, Hardware(**values | changed), workers)


def completions(piece: Piece) -> list[Completion]:
    return [Completion(request.id, (1,), "stop", -1.0) for request in piece.requests]


def test_the_longest_prompts_come_first_and_done_requests_not_at_all() -> None:
    """A piece that is done is left out. Of one that is partly done only the rest is given."""
    first = hand_out().next()
    assert first is not None
    done = frozenset(request.id for request in first.requests) | {"0"}
    work, given, lengths = hand_out(done), [], []
    while work.open:
        piece = work.next()
        assert piece is not None
        lengths.append(len(piece.requests[-1].prompt))
        given += [one.id for one in work.take(piece, completions(piece))]
        work.finish(piece)
    assert sorted(given, key=int) == [request.id for request in REQUESTS if request.id not in done]
    assert lengths == sorted(lengths, reverse=True)


def test_an_idle_worker_does_the_piece_of_a_hanging_one() -> None:
    work = hand_out(generation_batch=60)
    slow, other = work.next(), work.next()
    assert slow is not None and other is not None
    assert len(list(work.take(slow, completions(slow)[:5]))) == 5  # and then it hangs
    list(work.take(other, completions(other)))
    work.finish(other)
    assert work.next() is slow
    assert work.next() is None  # two workers are enough
    rest = [one.id for one in work.take(slow, completions(slow))]
    assert len(rest) == len(slow.requests) - 5
    work.finish(slow)
    assert not work.open
    assert list(work.take(slow, completions(slow))) == []  # the slow one wakes up


def test_a_piece_of_an_earlier_call_is_ignored() -> None:
    earlier, work = hand_out(), hand_out()
    stale = earlier.next()
    assert stale is not None
    assert list(work.take(stale, completions(stale))) == []
    work.lost(stale, "signal 9")
    work.finish(stale)
    assert len(work.open) == len(earlier.open)


def test_a_lost_piece_goes_to_another_and_is_given_up_in_the_end() -> None:
    work = hand_out(workers=1, generation_batch="auto")
    for attempt in range(ATTEMPTS):
        piece = work.next()
        assert piece is not None and len(piece.requests) == len(REQUESTS)
        if attempt < ATTEMPTS - 1:
            work.lost(piece, "signal 9")
        else:
            with pytest.raises(UserError, match=r"3 processes ended .* signal 11"):
                work.lost(piece, "signal 11")


@pytest.mark.parametrize(
    ("workers", "most", "sizes"),
    [
        (1, 1024, [100]),
        (3, 1024, [34, 34, 32]),
        (2, 30, [25, 25, 25, 25]),
        (8, 4, [4] * 25),
        (200, 1, [1] * 100),
    ],
)
def test_with_auto_pieces_are_equal(
    monkeypatch: pytest.MonkeyPatch, workers: int, most: int, sizes: list[int]
) -> None:
    """Each worker gets as many, and none is larger than PIECE, so all finish at about the same time."""
    monkeypatch.setattr(handout, "PIECE", most)
    work = hand_out(workers=workers, generation_batch="auto")
    assert sorted((len(piece.requests) for piece in work.open), reverse=True) == sizes


def test_a_piece_that_is_started_again_does_what_is_missing() -> None:
    """With `auto`. With a fixed batch it is computed whole, so that the bytes stay the same."""
    for batch, wanted in (("auto", 20), (50, 50)):
        work = hand_out(generation_batch=batch)
        piece = work.next()
        assert piece is not None and len(work.to_do(piece)) == 50
        assert len(list(work.take(piece, completions(piece)[:30]))) == 30
        work.lost(piece, "signal 9")
        assert len(work.to_do(piece)) == wanted
        list(work.take(piece, [Completion(one.id, (1,), "stop", -1.0) for one in work.to_do(piece)]))
        work.finish(piece)
        assert len(work.open) == 1


@pytest.mark.parametrize("batch", [8, "auto"])
@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_every_request_is_given_once(
    monkeypatch: pytest.MonkeyPatch, seed: int, batch: Any
) -> None:
    """Workers die, hang for good or finish late, in any order; only one of them always works."""
    monkeypatch.setattr(handout, "PIECE", 8)
    rng = random.Random(seed)
    work, given, deaths = hand_out(generation_batch=batch), [], 0
    busy: dict[int, tuple[Piece, list[Completion]]] = {}
    hung: set[int] = set()
    turns = 0
    while work.open:
        turns += 1
        assert turns < 2000, "no end"
        worker = rng.randrange(4)
        if worker in hung:
            continue
        if worker not in busy:
            if (begun := work.next()) is not None:
                answers = [Completion(one.id, (1,), "stop", -1.0) for one in work.to_do(begun)]
                busy[worker] = begun, answers
            continue
        piece, answers = busy[worker]
        fate = rng.random() if worker else 0.0
        part = answers[: rng.randint(0, len(answers))]
        if fate < 0.7:
            given += [one.id for one in work.take(piece, answers)]
            work.finish(piece)
            del busy[worker]
        elif fate < 0.9 and deaths < ATTEMPTS - 1:
            deaths += 1
            given += [one.id for one in work.take(piece, part)]
            work.lost(piece, "signal 9")
            del busy[worker]
        elif len(hung) < 1:  # a piece is begun twice, not more: a second one that hangs is a lost worker
            given += [one.id for one in work.take(piece, part)]
            hung.add(worker)
    assert sorted(given, key=int) == [request.id for request in REQUESTS]
