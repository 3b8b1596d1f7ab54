"""The statistics of votes: who is elected, the paired difference from the majority, and the control."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from stages.run.errors import UserError
from stages.stats.one import BOOTSTRAP_SEED, elected, majority, votes_of
from stages.stats.p_value import mcnemar_p
from stages.stats.paired import paired_rates
from stages.stats.vote import VoteSummary


def row(name: str, *answers: str | None) -> dict[str, Any]:
    """A question whose right answer is 5."""
    return {"id": name, "samples": [{"answer": answer, "correct": answer == "5"} for answer in answers]}


def test_the_heaviest_answer_is_elected() -> None:
    votes = votes_of(row("q", "5", "6", "6", None)["samples"])
    assert elected(votes, [1, 1, 1, 9]) == 0.0  # no answer is no vote
    assert elected(votes, [1.0, 0.3, 0.3, 9]) == 1.0
    assert elected(votes, [0.6, 0.3, 0.3, 0]) == 0.5  # a tie counts half
    assert elected([votes[0]] * 2 + votes[1:3], [0.1, 0.2, 0.3, 0]) == 0.5  # also when 0.1 + 0.2 is not 0.3
    assert elected([None], [1.0]) == 0.0
    assert elected(votes, [0.0] * 4) == 0.5


def test_a_wrong_answer_of_one_is_not_the_right_one() -> None:
    """In Python 1 equals True."""
    assert majority(row("q", "1", "1", None)["samples"]) == 0.0
    assert majority(row("q", "5", "1", "6", "6")["samples"]) == 0.0
    assert majority(row("q", "5", "5", "1")["samples"]) == 1.0


def test_paired_rates_on_whole_questions_are_mcnemars() -> None:
    before, after = [0.0] * 9 + [1.0] * 4 + [1.0] * 50, [1.0] * 9 + [0.0] * 4 + [1.0] * 50
    made = paired_rates(before, after, ("the majority", "coherence"))
    assert made["difference"] == pytest.approx(5 / 63)
    assert made["difference_low"] < 5 / 63 < made["difference_high"]
    assert made["p"] == pytest.approx(mcnemar_p(9, 4))
    assert "no difference can be seen; one of at least" in made["verdict"]
    made = paired_rates(before, before, ("a", "b"))
    assert (made["p"], made["smallest_visible"]) == (1.0, None)
    assert made["verdict"] == "no difference can be seen: every question scored the same"


def test_paired_rates_of_ties_are_exact() -> None:
    """Shares of 1/m have a p below what drawn signs could show: 2 of the 2^40 choices are as one-sided."""
    made = paired_rates([1 / 3] * 40, [1.0] * 40, ("a", "b"))
    assert made["p"] == pytest.approx(2 / 2**40)
    assert made["verdict"] == "b is better (p < 0.0001)"


def test_a_signal_that_knows_beats_the_majority_and_its_shuffle_does_not() -> None:
    summary = VoteSummary("s_cf")
    rng = random.Random(1)
    for number in range(200):
        answers = ["5"] * 3 + rng.sample(["6"] * 4 + ["7"], 5)
        knows = [1.0 if answer == "5" else 0.1 for answer in answers]
        summary.add(row(f"q{number}", *answers), {"s_end": [1.0] * 8, "s_cf": knows})
    made = summary.metrics()
    assert (made["questions"], made["samples"], made["vote"]) == (200, 8, "s_cf")
    assert (made["maj_at_8"], made["coherent_at_8"], made["pass_at_8"]) == (0.0, 1.0, 1.0)
    assert made["difference"] == made["difference_low"] == 1.0
    assert made["p"] < 1e-6
    assert made["verdict"] == "coherence is better (p < 0.0001)"
    assert 0 < made["control_difference"] < 0.6  # the majority was always wrong: chance can only help
    assert made["control_difference_low"] < made["control_difference"] < made["control_difference_high"]
    assert made["by"]["s_end"]["difference"] == 0.0
    assert made["by"]["s_cf"]["accuracy"] == 1.0


def test_the_control_is_nothing_where_the_majority_is_right() -> None:
    """Shuffled weights then elect a wrong answer now and then, and nothing where all samples agree."""
    summary = VoteSummary("s_cf")
    summary.add(row("a", *["5"] * 4), {"s_cf": [0.1, 0.9, 0.1, 0.1]})
    assert list(summary.control) == [1.0]
    summary.add(row("b", "5", "5", "5", "6"), {"s_cf": [0.1, 0.1, 0.1, 9.0]})
    assert 0 < summary.control[1] < 1
    assert summary.metrics()["control_difference"] < 0


def test_a_rule_that_could_not_weigh_every_question_is_left_out() -> None:
    summary = VoteSummary("s_cf")
    summary.add(row("a", "5", "6"), {"s_cf": [1, 1], "logprob": [1, 1]})
    summary.add(row("b", "5", "6"), {"s_cf": [1, 1]})
    assert list(summary.metrics()["by"]) == ["s_cf"]


def test_every_question_needs_the_same_number_of_samples() -> None:
    summary = VoteSummary("s_cf")
    summary.add(row("a", "5", "6"), {"s_cf": [1, 1]})
    summary.add(row("b", "5"), {"s_cf": [1]})
    with pytest.raises(UserError, match=r"question '(a' has 2|b' has 1) samples"):
        summary.metrics()


def test_the_order_of_the_questions_changes_no_accuracy() -> None:
    rows = [row(f"q{i}", "5", "6", "5" if i % 3 else "6") for i in range(30)]
    made = []
    for order in (rows, rows[::-1]):
        summary = VoteSummary("s_cf")
        for one in order:
            summary.add(one, {"s_cf": [0.9, 0.5, 0.1]})
        made.append(summary.metrics())
    assert made[0]["coherent_at_3"] == made[1]["coherent_at_3"]
    assert made[0]["difference_low"] == made[1]["difference_low"]
    assert made[0]["maj_at_3"] == float(np.mean([majority(one["samples"]) for one in rows]))
    assert BOOTSTRAP_SEED == 0
