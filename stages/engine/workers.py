"""Generation in several processes of one host, each with its own device and its own copy of the policy.

Work is handed out in pieces, so a process that dies costs its piece only: another one does it again. The pieces
are those a single process would make, so the completions are the same as with one.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Self

from stages.core.errors import UserError
from stages.core.params import Hardware
from stages.engine.base import Completion, Request, plan

ATTEMPTS = 3  # at one piece
PIECE = 512  # requests, where the engine itself decides what to compute together


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    piece: list[Request] | None = None
    tries: int = 0


class WorkersEngine:
    """An `Engine` of `count` processes; use it in a `with` block, which ends them."""

    def __init__(self, adapter: Path | None, hardware: Hardware, count: int) -> None:
        self.adapter, self.hardware, self.count = adapter, hardware, count
        self.workers: list[_Worker] = []

    def __enter__(self) -> Self:
        import torch

        if 0 < (gpus := torch.cuda.device_count()) < self.count:
            raise UserError(f"hardware.processes: {self.count}, but there are {gpus} GPUs; say auto")
        self.workers = [self._start(rank) for rank in range(self.count)]
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()

    def generate(
        self, requests: Iterable[Request], done: frozenset[str] = frozenset()
    ) -> Iterator[Completion]:
        """See `Engine.generate`. Raises UserError when a piece ends its process again and again."""
        size = PIECE if self.hardware.generation_batch == "auto" else self.hardware.generation_batch
        pieces = [piece for piece in plan(requests, size) if any(one.id not in done for one in piece)]
        pieces.reverse()  # the longest prompts first, so that no process is left with them at the end
        waiting = deque((piece, 0) for piece in pieces)
        given = set(done)
        while waiting or any(worker.piece for worker in self.workers):
            for worker in self.workers:
                if worker.piece is None and waiting:
                    worker.piece, worker.tries = waiting.popleft()
                    with contextlib.suppress(OSError):  # it is dead; reading from it will say so
                        worker.pipe.send(worker.piece)
            busy = {worker.pipe: worker for worker in self.workers if worker.piece}
            for pipe in connection.wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                try:
                    message = worker.pipe.recv()
                except (EOFError, OSError):
                    if worker.piece:
                        waiting.append((worker.piece, worker.tries + 1))
                    self._replace(worker)
                    continue
                if message is None:
                    worker.piece = None
                elif isinstance(message, UserError):
                    raise message
                elif message.id not in given:
                    given.add(message.id)
                    yield message

    def _replace(self, worker: _Worker) -> None:
        worker.process.join()
        code = worker.process.exitcode
        if worker.tries + 1 >= ATTEMPTS:
            raise UserError(
                f"generation: {ATTEMPTS} processes ended while they did the same piece of work (the last with "
                f"status {code}); what they said is above. Lower hardware.generation_batch if memory ran out; "
                "what is done is kept"
            )
        rank = self.workers.index(worker)
        self.workers[rank] = self._start(rank)

    def _start(self, rank: int) -> _Worker:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=serve, args=(theirs, rank, self.adapter, self.hardware, os.getpid()), daemon=True
        )
        process.start()
        theirs.close()
        return _Worker(process, ours)


def serve(pipe: Connection, rank: int, adapter: Path | None, hardware: Hardware, parent: int) -> None:
    """One process: loads the policy, completes pieces until the pipe is closed."""
    from stages.core.guard import end_with
    from stages.core.launch import fix_arithmetic, prepare_process

    end_with(parent)
    prepare_process()
    _own_device(rank)
    try:
        fix_arithmetic(hardware.threads, seed=0)  # every request has a seed of its own
        from stages.engine.choose import load_engine

        engine = load_engine(adapter, hardware)
        while True:
            piece = pipe.recv()
            for completion in engine.generate(piece):
                pipe.send(completion)
            pipe.send(None)
    except UserError as error:
        pipe.send(error)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass  # the stage has ended


def _own_device(rank: int) -> None:
    """Let this process see one GPU only (vLLM takes the first it sees); to be called before CUDA starts."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible != "":  # which hides them all
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[rank] if visible else str(rank)
    os.environ["LOCAL_RANK"] = "0"
