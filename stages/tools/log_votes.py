"""`--vote SIGNAL` of `grade` and `compare`: the samples of a log vote for the answer by their coherence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from stages.regime_w.voting import Voter
from stages.run.errors import UserError
from stages.run.params import load_params
from stages.stats.one import elected, votes_of
from stages.stats.p_value import p_words
from stages.stats.vote import VoteSummary


class LogVotes:
    """The votes of a log, by the scorer and the weights of params.yaml. Raises UserError when these cannot be used."""

    def __init__(self, rule: str) -> None:
        self.voter = Voter(load_params().regime_w, rule)
        self.summary = VoteSummary(rule)

    def weigh(self, row: Mapping[str, Any]) -> dict[str, list[float]]:
        """The weights of a row's samples by each rule.

        Raises ValueError when the row has no question, no samples, or ones that are not graded.
        """
        if not row.get("samples"):
            raise ValueError(
                "no samples, so there is nothing to vote on (a list of texts: --samples of `grade`)"
            )
        for sample in row["samples"]:
            if not isinstance(sample, dict) or not {"completion", "answer", "correct"} <= sample.keys():
                raise ValueError(
                    "a sample has no graded 'completion'; run `python -m stages grade` on this log"
                )
        if not isinstance(row.get("question"), str):
            raise ValueError("the vote needs the question's text; name its field with --question of `grade`")
        return self.voter.weigh(row["question"], row["samples"], row.get("id", ""))

    def add(self, row: Mapping[str, Any]) -> None:
        """Count one graded row; raises as `weigh`."""
        self.summary.add(row, self.weigh(row))

    def elected(self, row: Mapping[str, Any]) -> float:
        """1 when the answer that a graded row's samples elect is right; a right one among m tied ones counts 1/m."""
        return elected(votes_of(row["samples"]), self.weigh(row)[self.voter.rule])

    def metrics(self) -> dict[str, Any]:
        """As those of the stage `vote`. Raises UserError when questions have different numbers of samples."""
        if not self.summary.majority:
            raise UserError("--vote: no record has samples")
        return self.summary.metrics()


def print_votes(console: Console, votes: Mapping[str, Any]) -> None:
    """Print what the vote brought, in three lines."""
    k = votes["samples"]
    for name, key in (("majority", "maj"), (f"by {votes['vote']}", "coherent"), ("ceiling", "pass")):
        value, low, high = (100 * votes[f"{key}_at_{k}{end}"] for end in ("", "_low", "_high"))
        console.print(f"vote of {k} samples, {name}: {value:.1f} % ({low:.1f}–{high:.1f})")
    change, low, high = (100 * votes[f"difference{end}"] for end in ("", "_low", "_high"))
    console.print(
        f"against the majority: {change:+.1f} points ({low:+.1f} to {high:+.1f}), {p_words(votes['p'])}; "
        f"shuffled {100 * votes['control_difference']:+.1f}"
    )
    console.print(f"vote: {votes['verdict']}")
