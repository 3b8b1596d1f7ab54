"""The vote: what each sample weighs, by the shipped scorer and by one's own, and that no gold is looked at."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from stages.regime_w import signals, with_logprob
from stages.regime_w.confidence import POWER, probability
from stages.regime_w.voting import REACH, SHARE, Voter
from stages.run.errors import UserError
from stages.run.params import RegimeW, load_params
from tests.regime_w.worked_example import QUESTION, TEXTS

REPO = Path(__file__).resolve().parents[2]
SHIPPED = REPO / "stages" / "regime_w" / "signals.py"
S_CF = [5 / 9, 5 / 9, 4 / 9, 0]


def params(scorer: Path = SHIPPED, **changes: Any) -> RegimeW:
    return load_params(REPO / "tests" / "small").regime_w.model_copy(
        update={"scorer": str(scorer), **changes}
    )


def samples(**more: Any) -> list[dict[str, Any]]:
    return [{"completion": text, "correct": index < 3, **more} for index, text in enumerate(TEXTS)]


def test_the_weights_of_the_worked_example() -> None:
    weights = Voter(params()).weigh(QUESTION, samples(logprob=-2.0, tokens=20))
    sure = math.exp(-0.1 * POWER)
    assert weights["s_cf"] == pytest.approx([s_cf + SHARE for s_cf in S_CF])
    assert weights["s_end"] == pytest.approx([2 / 3 + SHARE] * 3 + [SHARE])
    assert weights["logprob"] == pytest.approx([sure] * 4)
    assert weights["both"] == pytest.approx([(s_cf + SHARE) * sure for s_cf in S_CF])
    # All three numbers move the first two answers and the last, two of three the third.
    reach = [a + b * REACH for a, b in zip(weights["s_cf"], (1, 1, 2 / 3, 1), strict=True)]
    assert weights["reach"] == pytest.approx(reach)
    assert weights["all"] == pytest.approx([one * sure for one in reach])
    assert list(weights) == ["s_end", "s_path", "s_cf", "s_wm", "reach", "logprob", "both", "all"]


def test_only_the_solution_is_weighed() -> None:
    """A next problem, begun after the answer, adds nothing."""
    leaking = [{"completion": TEXTS[0] + "\n\nQuestion:\nTom has 9 pens.\nAnswer:\n9+9 = 18\n#### 18"}]
    weights = Voter(params()).weigh(QUESTION, leaking + samples()[:1])
    assert weights["s_path"] == pytest.approx([1 + SHARE] * 2)


def test_an_answer_that_no_number_moves_reaches_nothing() -> None:
    """Also one that is rounded, or rests on an equation that does not hold."""
    texts = ["<<9/6=2>>2 #### 2", "<<3*4=13>>13 #### 13", "<<3*4=12>>12 <<12-2=10>>10 #### 10", "#### 10"]
    weights = Voter(params()).weigh(QUESTION, [{"completion": text} for text in texts])
    moved = [(a - b) / REACH for a, b in zip(weights["reach"], weights["s_cf"], strict=True)]
    assert moved == pytest.approx([0, 0, 1, 0])
    for question in ("Two and two?", ""):
        weights = Voter(params()).weigh(question, [{"completion": "<<2+2=4>>4 #### 4"}] * 2)
        assert weights["reach"] == weights["s_cf"] == [1 + SHARE] * 2


def test_without_log_probabilities_the_signals_are_left() -> None:
    for more in ({}, {"logprob": None, "tokens": 20}, {"logprob": -2.0}, {"logprob": "-2", "tokens": 20}):
        assert list(Voter(params()).weigh(QUESTION, samples(**more))) == [*signals.SIGNALS, "reach"]
    for rule in ("logprob", "both", "all"):
        with pytest.raises(UserError, match=rf"^question 'q1': a sample has no 'logprob'.*'{rule}' needs"):
            Voter(params(), rule).weigh(QUESTION, samples(), "q1")


def test_the_rule_is_that_of_the_parameters_or_the_one_named() -> None:
    assert Voter(params(vote="s_wm")).rule == "s_wm"
    assert Voter(params(vote="s_wm"), "s_end").rule == "s_end"


def test_a_scorer_of_ones_own_weighs_and_sees_no_verdict(tmp_path: Path) -> None:
    scorer = tmp_path / "mine.py"
    scorer.write_text(
        "def score_group(question, trajectories):\n"
        "    assert all('correct' not in one and one['tokens'] == 3 for one in trajectories)\n"
        "    n = len(trajectories)\n"
        "    own = [i / n for i in range(n)]\n"
        "    return {'s_end': own, 's_path': own, 's_cf': [1 - x for x in own], 's_wm': own}\n"
    )
    weights = Voter(params(scorer)).weigh(QUESTION, samples(tokens=3))
    assert weights["s_cf"] == pytest.approx([1 + SHARE, 0.75 + SHARE, 0.5 + SHARE, 0.25 + SHARE])
    scorer.write_text("def score_group(question, trajectories):\n    raise ValueError('no')\n")
    with pytest.raises(UserError, match=r"mine\.py: question 'q7': the scorer raised ValueError: no"):
        Voter(params(scorer)).weigh(QUESTION, samples(), "q7")


def test_how_sure_the_policy_was() -> None:
    assert probability({"logprob": -1.0, "tokens": 64}) == pytest.approx(math.exp(-1))
    assert probability({"logprob": 0.0, "tokens": 5}) == 1.0
    assert probability({"logprob": -3.0, "tokens": 0}) == 0.0  # nothing but the end token
    assert probability({"tokens": 5}) is None


def test_the_second_scorer_is_half_coherence_and_half_confidence() -> None:
    rows = [
        {"text": text, "answer": "10", "logprob": -float(index), "tokens": 64}
        for index, text in enumerate(TEXTS)
    ]
    plain, mixed = signals.score_group(QUESTION, rows), with_logprob.score_group(QUESTION, rows)
    assert mixed.s_wm == pytest.approx([(s_wm + math.exp(-i)) / 2 for i, s_wm in enumerate(plain.s_wm)])
    assert (mixed.s_end, mixed.s_path, mixed.s_cf) == (plain.s_end, plain.s_path, plain.s_cf)
    with pytest.raises(ValueError, match="no 'logprob' or no 'tokens'"):
        with_logprob.score_group(QUESTION, [{"text": TEXTS[0], "answer": "10"}])
    weights = Voter(params(REPO / "stages/regime_w/with_logprob.py")).weigh(
        QUESTION, samples(logprob=0.0, tokens=9)
    )
    assert weights["s_wm"][:3] == pytest.approx([(s + 1) / 2 + SHARE for s in (29 / 45, 29 / 45, 28 / 45)])
