"""Suspicion: trajectories that agree soundly on another answer than the gold's, and nothing else."""

from __future__ import annotations

from fractions import Fraction

import pytest

from stages.regime_w.signals import analyse_group
from stages.regime_w.suspicion import suspicion

QUESTION = "Ann has 3 bags of 4 apples and eats 2. How many apples are left?"
TEN = "<<3*4=12>>12 <<12-2=10>>10\n#### 10"
TEN_ANOTHER_WAY = "<<4+4+4=12>>12 <<12-2=10>>10\n#### 10"
TEN_BY_A_WRONG_SUM = "<<3*4=11>>11 <<11-1=10>>10\n#### 10"
TEN_FROM_NOWHERE = "#### 10"
FIVE = "<<3+4=7>>7 <<7-2=5>>5\n#### 5"


def judged(gold: str, *texts: str) -> tuple[float, str | None]:
    views = [{"text": text, "answer": text.rpartition("#### ")[2] or None} for text in texts]
    reasonings = analyse_group(QUESTION, views).reasonings
    return suspicion(reasonings, [view["answer"] == gold for view in views])


@pytest.mark.parametrize(
    ("gold", "texts", "expected"),
    [
        ("5", [TEN] * 6 + [FIVE, TEN_ANOTHER_WAY], ((6 - 1) / 8, "10")),
        ("7", [TEN] * 3 + [FIVE] * 2, (3 / 5, "10")),
        ("10", [TEN] * 8, (0.0, None)),  # they agree with the gold
        ("5", [TEN] * 3 + [FIVE] * 3, (0.0, None)),  # the gold has as many
        ("5", [TEN, TEN_ANOTHER_WAY], (0.0, None)),  # one answer, for two reasons
        ("5", [TEN_BY_A_WRONG_SUM] * 8, (0.0, None)),  # not sound: a sum they rest on is wrong
        ("5", [TEN_FROM_NOWHERE] * 8, (0.0, None)),  # no equation carries the answer
        ("5", [TEN], (0.0, None)),  # one alone agrees with nobody
        ("5", ["no answer, #### "] * 4, (0.0, None)),
    ],
)
def test_suspicion(gold: str, texts: list[str], expected: tuple[float, str | None]) -> None:
    assert judged(gold, *texts) == expected


def test_any_order_gives_the_same() -> None:
    texts = [TEN, FIVE, TEN, TEN_ANOTHER_WAY, TEN]
    assert judged("9", *texts) == judged("9", *reversed(texts)) == (float(Fraction(3, 5)), "10")
