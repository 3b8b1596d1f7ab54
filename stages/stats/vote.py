"""Statistics of votes: is the answer that weighted votes elect right more often than that of the majority?

summary = VoteSummary("s_cf")
summary.add(row, {"s_end": [...], "s_cf": [...]})    # one question; its samples' weights by each rule
summary.metrics()                                    # coherent_at_8 beside maj_at_8, paired
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stages.stats.one import (
    BOOTSTRAP_SEED,
    RIGHT,
    Row,
    bootstrap_interval,
    elected,
    interval_keys,
    one_size,
    votes_of,
)
from stages.stats.paired import paired_rates

SHUFFLES = 20
NAMES = ("the majority", "coherence")


class VoteSummary:
    """What the majority and each rule elected, question by question; `rule` is the one that counts.

    The control is the same vote with the weights of each question shuffled among its samples, on average over
    `SHUFFLES` times: weights that say nothing. Memory grows by 8 bytes with each question and rule.
    """

    def __init__(self, rule: str) -> None:
        self.rule = rule
        self.sizes: dict[int, Any] = {}  # samples a question -> the first id that has so many
        self.majority, self.control, self.passed = array("d"), array("d"), array("d")
        self.rules: dict[str, array[float]] = {}

    def add(self, row: Row, weights: Mapping[str, Sequence[float]]) -> None:
        """Count one question with graded samples, whose weights by each rule are in their order."""
        votes = votes_of(row["samples"])
        self.sizes.setdefault(len(votes), row.get("id"))
        self.passed.append(RIGHT in votes)
        self.majority.append(elected(votes, [1] * len(votes)))
        for rule, values in weights.items():
            self.rules.setdefault(rule, array("d")).append(elected(votes, values))
        self.control.append(self._shuffled(votes, weights[self.rule]))

    def _shuffled(self, votes: list[Any], weights: Sequence[float]) -> float:
        if len(set(votes) - {None}) < 2:  # whatever the weights
            return self.majority[-1]
        shuffled, rng = list(weights), random.Random(len(self.majority))
        total = 0.0
        for _ in range(SHUFFLES):
            rng.shuffle(shuffled)
            total += elected(votes, shuffled)
        return total / SHUFFLES

    def last(self) -> dict[str, float]:
        """How right the majority and the rule that counts were on the question added last: 1, 0, or 1/m in a tie."""
        return {"majority": self.majority[-1], "coherent": self.rules[self.rule][-1]}

    def metrics(self) -> dict[str, Any]:
        """The accuracies with their intervals, and each rule paired with the majority; nothing rounded.

        A rule that could not weigh every question is left out. Raises UserError when questions have different numbers
        of samples.
        """
        k = one_size(self.sizes)
        out: dict[str, Any] = {"questions": len(self.majority), "samples": k, "vote": self.rule}
        chosen = self.rules[self.rule]
        for name, values in (("maj", self.majority), ("coherent", chosen), ("pass", self.passed)):
            out |= _rate(f"{name}_at_{k}", values)
        out |= paired_rates(self.majority, chosen, NAMES, BOOTSTRAP_SEED)
        without = np.asarray(self.control) - np.asarray(self.majority)
        out |= interval_keys(
            "control_difference", float(without.mean()), bootstrap_interval(without, BOOTSTRAP_SEED)
        )
        whole = {rule: values for rule, values in self.rules.items() if len(values) == len(self.majority)}
        out["by"] = {
            rule: {
                **_rate("accuracy", values),
                **paired_rates(self.majority, values, ("the majority", rule), BOOTSTRAP_SEED),
            }
            for rule, values in whole.items()
        }
        return out


def _rate(name: str, values: Sequence[float]) -> dict[str, float]:
    return interval_keys(name, float(np.mean(values)), bootstrap_interval(values, BOOTSTRAP_SEED))
