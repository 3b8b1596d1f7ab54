"""Options and helpers for all tests."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable

import pytest

# The models of the tests are tiny. More threads would only wait for each other, for minutes on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--kills N`: how often tests/pipeline/test_kill.py kills each stage."""
    parser.addoption(
        "--kills", type=int, default=2, help="kills of each stage in tests/pipeline/test_kill.py"
    )


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
