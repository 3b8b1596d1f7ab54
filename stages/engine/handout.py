"""Who does which piece of work: shared by the engines of one host's processes and of a cluster's workers.

    work = HandOut(requests, done, hardware, workers=2)
    while work.open:
        piece = work.next()          # for an idle worker; None when all others are in good hands
        send(work.to_do(piece))
        yield from work.take(piece, completions)
        work.finish(piece)           # or work.lost(piece, "signal 9") when its worker is gone

A worker that dies costs its piece only: it goes to another one. A slow or hanging worker costs no more: once
nothing is waiting, an idle worker begins its piece as well, and whoever is first counts.

With `hardware.generation_batch` set, the pieces are a single process's batches: the completions are the same, to the
byte, whoever computes them. With `auto` each engine divides its piece by its own memory, and rounding may differ; the
pieces are then large and equal, so that GPUs are full and end together, and of one that is begun again only what is
missing is done.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from stages.core.errors import UserError
from stages.core.params import Hardware
from stages.engine.base import Completion, Request, plan

ATTEMPTS = 3  # at one piece
PIECE = 1024  # requests at most, where the engine itself decides what to compute together


@dataclass(eq=False)
class Piece:
    """Requests that are computed together."""

    requests: list[Request]
    workers: int = 0  # that do it now
    losses: int = 0  # workers that ended while they did it


class HandOut:
    """The pieces that are left to do."""

    def __init__(
        self, requests: Iterable[Request], done: frozenset[str], hardware: Hardware, workers: int
    ) -> None:
        self._together = hardware.generation_batch != "auto"
        if hardware.generation_batch == "auto":
            requests = [one for one in requests if one.id not in done]
            turns = max(1, math.ceil(len(requests) / (workers * PIECE)))
            size = max(1, math.ceil(len(requests) / (workers * turns)))
        else:
            size = hardware.generation_batch
        pieces = [Piece(piece) for piece in plan(requests, size) if any(one.id not in done for one in piece)]
        pieces.reverse()  # the longest prompts first, so that no worker is left with them at the end
        self.open = dict.fromkeys(pieces)  # in the order they were begun
        self._waiting = deque(pieces)
        self._given = set(done)

    def next(self) -> Piece | None:
        """A piece for an idle worker: one that nobody does, else one that only one worker does."""
        if self._waiting:
            piece = self._waiting.popleft()
        else:
            shared = (piece for piece in self.open if piece.workers < 2)
            found = next(shared, None)
            if found is None:
                return None
            piece = found
        piece.workers += 1
        return piece

    def to_do(self, piece: Piece) -> list[Request]:
        """What a worker that begins the piece completes: all that is computed together, else what is missing."""
        return [one for one in piece.requests if self._together or one.id not in self._given]

    def take(self, piece: Piece, completions: Iterable[Completion]) -> Iterator[Completion]:
        """The completions nobody has given yet; none when the piece is finished or of an earlier call."""
        for completion in completions if piece in self.open else ():
            if completion.id not in self._given:
                self._given.add(completion.id)
                yield completion

    def finish(self, piece: Piece) -> None:
        """All completions of the piece have been taken."""
        self.open.pop(piece, None)

    def lost(self, piece: Piece, why: str) -> None:
        """Its worker is gone. Raises UserError when that has happened again and again with this piece."""
        if piece not in self.open:
            return
        piece.workers -= 1
        piece.losses += 1
        if piece.losses >= ATTEMPTS:
            raise UserError(
                f"generation: {ATTEMPTS} processes ended while they did the same piece of work (the last: {why}); "
                "what they said is above. Lower hardware.generation_batch if memory ran out; what is done is kept"
            )
        if not piece.workers:
            self._waiting.append(piece)
