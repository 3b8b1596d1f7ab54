"""Hands out pieces of work to workers: the processes of one host, or the actors of a cluster.

    work = HandOut(requests, done, hardware, workers=2)
    while work.open:
        piece = work.next()          # for an idle worker; None when no piece needs another worker
        send(work.to_do(piece))
        yield from work.take(piece, completions)
        work.finish(piece)           # or work.lost(piece, "signal 9") when its worker is gone

When a worker dies, another one does its piece again. A slow or hanging worker does not hold up the rest either: once no
piece is waiting, an idle worker starts the same piece, and the first completion of a request counts.

With `hardware.generation_batch` set, a piece is a batch of a single process, so the completions are the same to the
byte whoever computes them. With `auto` each engine divides its piece by its own memory, and rounding may differ. The
pieces are then large and equal, so that all GPUs are full and finish together, and a piece that is started again does
only what is missing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from stages.policy.request import Completion, Request
from stages.run.errors import UserError
from stages.run.params import Hardware

ATTEMPTS = 3  # how many workers may die on one piece
PIECE = 1024  # most requests of a piece, when the engine divides it into batches itself


@dataclass(eq=False)
class Piece:
    """Some requests that one worker is given."""

    requests: list[Request]
    workers: int = 0  # how many work on it now
    losses: int = 0  # how many died while they worked on it


def batches(requests: Iterable[Request], size: int) -> list[list[Request]]:
    """The requests in batches of at most `size`: short prompts first, equal prompts side by side.

    The same requests always give the same batches, whichever of them are already done.
    """
    ordered = sorted(requests, key=lambda request: (len(request.prompt), request.prompt))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


class HandOut:
    """The pieces of some requests, and which of them are waiting, in work or finished."""

    def __init__(
        self, requests: Iterable[Request], done: frozenset[str], hardware: Hardware, workers: int
    ) -> None:
        self._together = hardware.generation_batch != "auto"
        if hardware.generation_batch != "auto":
            size = hardware.generation_batch
        else:
            requests = [one for one in requests if one.id not in done]
            turns = max(1, math.ceil(len(requests) / (workers * PIECE)))
            size = max(1, math.ceil(len(requests) / (workers * turns)))
        unfinished = (piece for piece in batches(requests, size) if any(one.id not in done for one in piece))
        # The longest prompts come first, so that no worker is left with them at the end.
        pieces = [Piece(piece) for piece in unfinished][::-1]
        self.open = dict.fromkeys(pieces)  # unfinished ones, in the order in which they were started
        self._waiting = deque(pieces)
        self._given = set(done)

    def next(self) -> Piece | None:
        """A piece for an idle worker: a waiting one, or else one that a single worker has. None if there is neither."""
        shared = (piece for piece in self.open if piece.workers < 2)
        piece = self._waiting.popleft() if self._waiting else next(shared, None)
        if piece:
            piece.workers += 1
        return piece

    def to_do(self, piece: Piece) -> list[Request]:
        """The requests to send to a worker: the whole batch when batches are fixed, else only what is missing."""
        return [one for one in piece.requests if self._together or one.id not in self._given]

    def take(self, piece: Piece, completions: Iterable[Completion]) -> Iterator[Completion]:
        """The completions that are new; none when the piece is finished or belongs to an earlier call."""
        for completion in completions if piece in self.open else ():
            if completion.id not in self._given:
                self._given.add(completion.id)
                yield completion

    def finish(self, piece: Piece) -> None:
        """Mark a piece as finished, once all its completions have been taken."""
        self.open.pop(piece, None)

    def lost(self, piece: Piece, why: str) -> None:
        """Put a piece back after its worker died. Raises UserError when ATTEMPTS workers died on it."""
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
