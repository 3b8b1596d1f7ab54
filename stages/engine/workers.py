"""Generation in several processes of one host, each with its own device and its own copy of the policy.

The requests are handed out in pieces (handout.py). When a process dies, another one does its piece again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Self

from stages.engine.handout import HandOut, Piece
from stages.engine.load import load_engine
from stages.launch.devices import visible_gpus
from stages.policy.request import Completion, Request
from stages.run.errors import UserError
from stages.run.guard import end_with
from stages.run.params import Hardware
from stages.run.process import fix_arithmetic, prepare_process


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    piece: Piece | None = None


class WorkersEngine:
    """An `Engine` of `count` processes; use it in a `with` block, which ends them."""

    def __init__(self, adapter: Path | None, hardware: Hardware, count: int) -> None:
        self.adapter, self.hardware, self.count = adapter, hardware, count
        self.workers: list[_Worker] = []

    def __enter__(self) -> Self:
        if 0 < (gpus := visible_gpus()) < self.count:
            raise UserError(f"hardware.processes: {self.count}, but there are {gpus} GPUs; say auto")
        try:
            for rank in range(self.count):
                self.workers.append(self._start(rank))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.process.kill()
            worker.process.join()

    def generate(
        self, requests: Iterable[Request], done: frozenset[str] = frozenset()
    ) -> Iterator[Completion]:
        """See `Engine.generate`. Raises UserError when a piece ends its process again and again."""
        work = HandOut(requests, done, self.hardware, self.count)
        while work.open:
            for worker in self.workers:
                if worker.piece is None and (piece := work.next()):
                    worker.piece = piece
                    with contextlib.suppress(OSError):  # it is dead; reading from it will say so
                        worker.pipe.send(work.to_do(piece))
            busy = {worker.pipe: (worker, worker.piece) for worker in self.workers if worker.piece}
            for pipe in connection.wait(list(busy)):
                worker, piece = busy[pipe]  # type: ignore[index]
                try:
                    message = worker.pipe.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    rank = self.workers.index(worker)
                    self.workers[rank] = self._start(rank)
                    work.lost(piece, f"status {worker.process.exitcode}")
                    continue
                if message is None:
                    work.finish(piece)
                    worker.piece = None
                elif isinstance(message, UserError):
                    raise message
                else:
                    yield from work.take(piece, [message])

    def _start(self, rank: int) -> _Worker:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        # Not a daemon: those may have no child processes, and vLLM starts some for a part of its settings.
        process = context.Process(
            target=serve, args=(theirs, rank, self.adapter, self.hardware, os.getpid()), daemon=False
        )
        process.start()
        theirs.close()
        return _Worker(process, ours)


def serve(pipe: Connection, rank: int, adapter: Path | None, hardware: Hardware, parent: int) -> None:
    """The work of one process: load the policy, then complete pieces until the pipe is closed."""
    end_with(parent)
    prepare_process()
    _own_device(rank)
    try:
        fix_arithmetic(hardware.threads, seed=0)  # every request has a seed of its own
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
    """Let this process see one GPU only, because vLLM takes the first it sees. CUDA must not have started yet."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible != "":  # an empty value hides all GPUs
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[rank] if visible else str(rank)
    os.environ["LOCAL_RANK"] = "0"
