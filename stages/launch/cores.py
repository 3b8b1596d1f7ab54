"""Maps a function over items on several cores, in order, with a bounded number of items in memory."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TypeVar

from stages.run.guard import end_with

Item = TypeVar("Item")
Result = TypeVar("Result")
WAITING = 3  # items per core that may be in memory


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def map_in_order(function: Callable[[Item], Result], items: Iterable[Item], cores: int) -> Iterator[Result]:
    """Yield `function(item)` for each item, in order, computed by `cores` processes (1: by this one).

    `function` must be picklable. An exception that it raises is raised here.
    """
    if cores == 1:
        yield from map(function, items)
        return
    waiting: deque[Future[Result]] = deque()
    with ProcessPoolExecutor(cores, initializer=_start, initargs=(os.getpid(),)) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > WAITING * cores:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which then ends its workers
    end_with(parent)
