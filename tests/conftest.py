"""Options and helpers for all tests."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

# The models of the tests are tiny. More threads would only wait for each other, for minutes on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The files that take longest. Two of the first three need no small run, so that the other workers need not wait for it.
LONG = [
    "pipeline/test_pipeline.py", "pipeline/test_big_profiles.py", "launch/test_training.py", "pipeline/test_kill.py",
    "pipeline/test_rounds.py", "pipeline/test_rerun_rules.py", "pipeline/test_remotes.py", "pipeline/test_processes.py",
    "launch/test_memory.py",
]  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--kills N`: how often tests/pipeline/test_kill.py kills each stage."""
    parser.addoption(
        "--kills", type=int, default=2, help="kills of each stage in tests/pipeline/test_kill.py"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that several workers (`pytest -n 3 --dist loadfile`) end at about the same time."""
    place = {Path(__file__).parent / name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.fixture(scope="session")
def ends_soon() -> Callable[[Callable[[], object]], bool]:
    """Whether a call ends within 30 seconds of processor time, however busy the machine is.

    The tests call it on texts for which linear code takes well under a second and quadratic code takes minutes. It
    bounds the order of growth, not the speed (bench/ measures that).
    """

    def ends(work: Callable[[], object]) -> bool:
        child = os.fork()
        if not child:
            resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
            failed = 1
            try:
                work()
                failed = 0
            finally:
                os._exit(failed)
        return os.waitpid(child, 0)[1] == 0

    return ends
