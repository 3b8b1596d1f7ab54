"""Generation on a Ray cluster: one actor for each GPU, each with its own copy of the policy.

The requests are handed out in pieces (handout.py). When an actor dies or hangs, another one does its piece again. A new
actor takes its place if its host is still up, and hosts that join later are used too. Completions come back as they
finish. The process that runs `dvc repro` writes the one journal.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from stages.engine.handout import ATTEMPTS, HandOut, Piece
from stages.engine.load import load_engine
from stages.launch.ray_cluster import WAIT_SECONDS, Place, last_line, usable_places
from stages.policy.request import Completion, Request
from stages.run.errors import UserError
from stages.run.params import Hardware
from stages.run.paths import BASE
from stages.run.process import fix_arithmetic, prepare_process
from stages.run.stage import manifest_path

SEND_SECONDS = 0.5  # an actor collects completions for so long before it sends them
LOOK_SECONDS = 5.0  # between two looks at which hosts are in the cluster


@dataclass
class _Worker:
    place: Place
    actor: Any
    answer: Any  # what we wait for: first that it has loaded, then the stream of a piece's completions; None when idle
    piece: Piece | None = None


class RayEngine:
    """An `Engine` of all devices of the cluster of `ray_cluster()`; use it in a `with` block, which gives them back."""

    def __init__(self, ray: Any, adapter: Path | None, hardware: Hardware) -> None:
        self.ray, self.adapter, self.hardware = ray, adapter, hardware
        self.workers: list[_Worker] = []
        self._failed_starts: Counter[Place] = Counter()
        self._hosts: dict[str, str] = {}  # what is wrong with a host, by Ray's id; "" when it can take part
        self._looked = self._last_alive = 0.0
        self._failure = "no host with a free device is in it"

    def __enter__(self) -> Self:
        self._fill_places(strict=True)
        hosts = {worker.place.node for worker in self.workers}
        _say(f"generating with {len(self.workers)} workers on {len(hosts)} hosts")
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            self.ray.kill(worker.actor)

    def generate(
        self, requests: Iterable[Request], done: frozenset[str] = frozenset()
    ) -> Iterator[Completion]:
        """See `Engine.generate`. Raises UserError when a piece ends its worker again and again, or none is left."""
        work = HandOut(requests, done, self.hardware, max(1, len(self.workers)))
        self._last_alive = time.monotonic()
        while work.open:
            self._fill_places()
            for worker in self.workers:
                if worker.answer is None and (piece := work.next()):
                    worker.piece = piece
                    worker.answer = worker.actor.complete.remote(work.to_do(piece))
            waited = {id(worker.answer): worker for worker in self.workers if worker.answer is not None}
            if not waited:
                time.sleep(LOOK_SECONDS)
                continue
            answers = [worker.answer for worker in waited.values()]
            ready, _ = self.ray.wait(answers, num_returns=1, timeout=LOOK_SECONDS)
            for answer in ready:
                yield from self._hear(waited[id(answer)], work)

    def _hear(self, worker: _Worker, work: HandOut) -> Iterator[Completion]:
        """Handle a worker's message: it has loaded, sends completions, has finished its piece, or is dead."""
        try:
            if worker.piece is None:
                self.ray.get(worker.answer)
                worker.answer = None
                self._failed_starts[worker.place] = 0
                return
            sent = next(worker.answer, None)
            if sent is None:
                work.finish(worker.piece)
                worker.piece = worker.answer = None
                return
            completions = self.ray.get(sent)
        except self.ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, UserError):
                raise UserError(f"Ray worker host {worker.place.host}: {cause}") from None
            self._lose(worker, work, last_line(error))
            return
        yield from work.take(worker.piece, completions)

    def _lose(self, worker: _Worker, work: HandOut, why: str) -> None:
        """Give up a worker and put its piece back."""
        self.workers.remove(worker)
        self.ray.kill(worker.actor)
        self._looked = 0.0  # look at once which hosts are there
        self._failure = why
        if worker.piece is None:
            self._failed_starts[worker.place] += 1
            _say(f"a worker on {worker.place.host} did not start ({why})")
        else:
            _say(f"a worker on {worker.place.host} is gone ({why}); another one does its piece")
            work.lost(worker.piece, why)

    def _fill_places(self, strict: bool = False) -> None:
        """Start an actor on every device that has none. `strict`: raise UserError for a host that cannot take part."""
        now = time.monotonic()
        if self.workers:
            self._last_alive = now
        elif self._last_alive and now - self._last_alive > WAIT_SECONDS:
            raise UserError(
                f"the Ray cluster has had no worker for {WAIT_SECONDS / 60:.0f} minutes ({self._failure}); what is "
                "done is kept. Start its hosts again (docs/gpus.md) and run the same command"
            )
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        loaded = [manifest_path(path) for path in (BASE, self.adapter) if path]
        before = set(self._hosts)
        places = usable_places(self.ray, self.hardware, loaded, self._hosts)
        for node, problem in self._hosts.items():
            if problem and strict:
                raise UserError(problem)
            if problem and node not in before:
                _say(f"{problem}; it takes no part")
        if strict and not places:
            raise UserError(
                "the Ray cluster has no device to work on; start workers with `ray start` (docs/gpus.md)"
            )
        taken = {worker.place for worker in self.workers}
        for place in places:
            if place not in taken and self._failed_starts[place] < ATTEMPTS:
                self.workers.append(self._start(place))
        if places and not self.workers:
            raise UserError(
                f"Ray worker host {places[0].host}: {ATTEMPTS} workers in a row did not start; the last: "
                f"{self._failure}"
            )

    def _start(self, place: Place) -> _Worker:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(place.node, soft=False)
        kind = self.ray.remote(num_cpus=place.cpus, num_gpus=place.gpus, scheduling_strategy=here)
        actor = kind(Server).remote()
        return _Worker(place, actor, actor.load.remote(str(Path.cwd()), self.adapter, self.hardware))


class Server:
    """The actor: loads the policy and completes pieces."""

    def load(self, project: str, adapter: Path | None, hardware: Hardware) -> None:
        """Load the policy in the project's folder. Raises UserError when it cannot be."""
        os.chdir(project)
        os.environ["LOCAL_RANK"] = "0"  # an actor sees only its own GPU
        prepare_process()
        fix_arithmetic(hardware.threads, seed=0)  # every request has a seed of its own
        self.engine = load_engine(adapter, hardware)

    def complete(self, piece: list[Request]) -> Iterator[list[Completion]]:
        """Yield the completions of a piece, in groups that finished at about the same time."""
        finished, sent = [], time.monotonic()
        for completion in self.engine.generate(piece):
            finished.append(completion)
            if time.monotonic() - sent > SEND_SECONDS:
                yield finished
                finished, sent = [], time.monotonic()
        yield finished


def _say(message: str) -> None:
    from rich.console import Console
    from rich.markup import escape

    Console(stderr=True, soft_wrap=True).print(f"[bold]ray[/bold]  {escape(message)}", highlight=False)
