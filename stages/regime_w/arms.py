"""What each arm (way to ask) brought: pulls, mean reward with its interval, share of the best, regret."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

Z = 1.959963984540054  # of a two-sided 95 % interval


@dataclass(slots=True)
class _Sums:
    pulls: int = 0
    uniform: int = 0
    total: float = 0.0
    squares: float = 0.0
    correct: int = 0
    best: float = 0.0


@dataclass(slots=True)
class ArmTable:
    """Sums per arm, fed question by question; tables of parts of a file add up.

    Once pulls are allocated adaptively their means are biased, so the effects come from uniform pulls only.
    """

    arms: dict[str, _Sums] = field(default_factory=dict)

    def add(self, pulls: Iterable[tuple[str, float, bool, bool]]) -> None:
        """One question's pulls: (arm, reward, correct, uniform). Ties share the point for the best reward."""
        rows = list(pulls)
        compared = [row for row in rows if row[3]]
        top = max((row[1] for row in compared), default=0.0)
        ties = sum(row[1] == top for row in compared)
        for arm, value, correct, uniform in rows:
            sums = self.arms.setdefault(arm, _Sums())
            sums.pulls += 1
            if uniform:
                sums.uniform += 1
                sums.total += value
                sums.squares += value * value
                sums.correct += correct
                sums.best += (value == top) / ties

    def merge(self, other: ArmTable) -> None:
        """Add another part's sums."""
        for arm, sums in other.arms.items():
            mine = self.arms.setdefault(arm, _Sums())
            for name in _Sums.__slots__:
                setattr(mine, name, getattr(mine, name) + getattr(sums, name))

    def rows(self) -> list[dict[str, Any]]:
        """A row per arm, by name: pulls, uniform_pulls, mean_reward, low, high, accuracy, best_share, regret.

        The 95 % interval of the mean is normal (null with fewer than two uniform pulls). `best_share` is the
        share of all best-of-question points that went to the arm. `regret` is the mean reward a pull falls
        short of the best fixed arm's.
        """
        means = {arm: sums.total / sums.uniform for arm, sums in self.arms.items() if sums.uniform}
        best_mean = max(means.values(), default=0.0)
        points = sum(sums.best for sums in self.arms.values())
        table = []
        for arm, sums in sorted(self.arms.items()):
            mean, n = means.get(arm), sums.uniform
            half = None
            if mean is not None and n > 1:
                variance = max(0.0, (sums.squares - n * mean * mean) / (n - 1))
                half = Z * sqrt(variance / n)
            table.append(
                {
                    "arm": arm,
                    "pulls": sums.pulls,
                    "uniform_pulls": n,
                    "mean_reward": mean,
                    "low": None if mean is None or half is None else mean - half,
                    "high": None if mean is None or half is None else mean + half,
                    "accuracy": sums.correct / n if n else None,
                    "best_share": sums.best / points if points else None,
                    "regret": None if mean is None else best_mean - mean,
                }
            )
        return table
