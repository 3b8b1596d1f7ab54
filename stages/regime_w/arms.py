"""What each arm (way to ask) brought: pulls, mean reward with its interval, share of the best, regret."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import sqrt
from typing import Any

Sums = dict[Any, Any]  # name -> a number, or further sums
Z = 1.959963984540054  # the normal distribution, two-sided 95 %


def add_sums(mine: Sums, theirs: Sums) -> None:
    """Add `theirs` to `mine`, number by number. A name that `mine` lacks counts as 0."""
    for name, value in theirs.items():
        if isinstance(value, dict):
            add_sums(mine.setdefault(name, Counter()), value)
        else:
            mine[name] = mine.get(name, 0) + value


def add_pulls(arms: Sums, pulls: Iterable[tuple[str, float, bool, bool]]) -> None:
    """Add one question's pulls, each (arm, reward, correct, uniform), to the sums by arm.

    Means over adaptively allocated pulls are biased, so rewards are summed over uniform pulls only. Pulls that tie for
    the question's best reward share one point.
    """
    rows = list(pulls)
    compared = [value for _, value, _, uniform in rows if uniform]
    top = max(compared, default=0.0)
    for arm, value, correct, uniform in rows:
        sums = arms.setdefault(arm, Counter())
        sums["pulls"] += 1
        if uniform:
            sums["uniform"] += 1
            sums["total"] += value
            sums["squares"] += value * value
            sums["correct"] += correct
            sums["best"] += (value == top) / compared.count(top)


def arm_rows(arms: Sums) -> list[dict[str, Any]]:
    """A row per arm, by name: pulls, uniform_pulls, mean_reward, low, high, accuracy, best_share, regret.

    The 95 % interval of the mean is normal (null with fewer than two uniform pulls). `best_share` is the share of all
    best-of-question points that went to the arm. `regret` is how far the arm's mean reward lies below the best arm's.
    """
    means = {arm: sums["total"] / sums["uniform"] for arm, sums in arms.items() if sums["uniform"]}
    best_mean = max(means.values(), default=0.0)
    points = sum(sums["best"] for sums in arms.values())
    table = []
    for arm, sums in sorted(arms.items()):
        mean, n = means.get(arm), sums["uniform"]
        half = None
        if mean is not None and n > 1:
            variance = max(0.0, (sums["squares"] - n * mean * mean) / (n - 1))
            half = Z * sqrt(variance / n)
        table.append(
            {
                "arm": arm,
                "pulls": sums["pulls"],
                "uniform_pulls": n,
                "mean_reward": mean,
                "low": None if mean is None or half is None else mean - half,
                "high": None if mean is None or half is None else mean + half,
                "accuracy": sums["correct"] / n if n else None,
                "best_share": sums["best"] / points if points else None,
                "regret": None if mean is None else best_mean - mean,
            }
        )
    return table
