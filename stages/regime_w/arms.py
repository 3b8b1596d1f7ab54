"""What each arm (way to ask) brought: pulls, mean reward with its interval, share of the best, regret."""

from __future__ import annotations

from collections import Counter
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


def add_pulls(arms: Sums, trajectories: list[dict[str, Any]]) -> None:
    """Add one question's scored trajectories to the sums by arm.

    Means over adaptively allocated pulls are biased, so rewards are summed over uniform pulls only. Pulls that tie for
    the question's best reward share one point.
    """
    # A file with propensities says which pulls were uniform. Without them all were.
    uniform = [pull for pull in trajectories if pull.get("uniform", "propensity" not in pull)]
    rewards = [pull["reward"] for pull in uniform]
    top = max(rewards, default=0.0)
    for pull in trajectories:
        arms.setdefault(str(pull.get("arm", "")), Counter())["pulls"] += 1
    for pull, reward in zip(uniform, rewards, strict=True):
        sums = arms[str(pull.get("arm", ""))]
        sums["uniform"] += 1
        sums["total"] += reward
        sums["squares"] += reward * reward
        sums["correct"] += pull["correct"]
        sums["best"] += (reward == top) / rewards.count(top)


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
