"""The signals are the formula of docs/regime-w.md: its worked example to six digits, and the properties it promises."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.regime_w.signals import SIGNALS, GroupScore, analyse_group, judge, score_group
from stages.text.answers import read_answer
from tests.regime_w.worked_example import QUESTION, TEXTS


def group(texts: list[str]) -> list[dict[str, str | None]]:
    return [{"text": text, "answer": read_answer(text).answer} for text in texts]


def test_worked_example_to_six_digits() -> None:
    score = score_group(QUESTION, group(TEXTS))
    assert score.s_end == pytest.approx([2 / 3, 2 / 3, 2 / 3, 0], abs=1e-12)
    assert score.s_path == pytest.approx([2 / 3, 2 / 3, 2 / 3, 0], abs=1e-12)
    assert score.s_cf == pytest.approx([5 / 9, 5 / 9, 4 / 9, 0], abs=1e-12)
    assert [round(value, 6) for value in score.s_wm] == [0.644444, 0.644444, 0.622222, 0]
    assert round(score.mean("s_wm"), 6) == 0.477778


def test_counterfactuals_of_the_worked_example() -> None:
    """What an explanation shows: where numbers come from, and what the answer becomes when one grows."""
    analysis = analyse_group(QUESTION, group(TEXTS))
    assert analysis.numbers == [3, 4, 2]
    found = [reasoning.counterfactuals for reasoning in analysis.reasonings]
    assert found == [(14, 13, 9), (14, 13, 9), (10, 13, 9), (6, 6, 4)]
    assert analysis.reasonings[0].links == [[-2, -3], [0, -4]]
    assert [reasoning.carrier for reasoning in analysis.reasonings] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("text", "counterfactuals"),
    [
        ("<<3*4=12>>12 #### 11", (None, None, None)),  # no equation carries the answer
        ("<<3*4=13>>13 <<13-2=11>>11 #### 11", (None, None, None)),  # it depends on one that does not hold
        ("<<3+4=9>>9 <<3*4=12>>12 #### 12", (16, 15, 12)),  # one that does not hold, but is not needed
        ("<<12/(3-4)=-12>> #### -12", (None, 6 * -1, -12)),  # 12 / (4 - 4) divides by zero
        ("50% * 4 = 2 \n#### 2", (2, 2.5, 2)),
    ],
)
def test_when_a_counterfactual_is_undefined(text: str, counterfactuals: tuple[float | None, ...]) -> None:
    assert analyse_group(QUESTION, group([text])).reasonings[0].counterfactuals == counterfactuals


def test_percent_of_the_question_moves_the_answer() -> None:
    (reasoning,) = analyse_group("20% of 50?", group(["20% * 50 = 10\n#### 10"])).reasonings
    assert reasoning.counterfactuals == (Fraction(21, 2), Fraction(51, 5))


def test_question_without_numbers_has_one_intervention() -> None:
    texts = ["<<2+3=5>>5 #### 5", "<<3+2=5>>5 #### 5", "#### 5"]
    assert score_group("Two and three?", group(texts)).s_cf == [0.5, 0.5, 0]


def test_absent_answers_agree_with_nothing() -> None:
    assert score_group(QUESTION, group(["no idea", "no clue"])) == GroupScore([0, 0], [0, 0], [0, 0], [0, 0])


def test_growing_denominators_end_as_undefined() -> None:
    """Squares of squares: the exact re-run would double its digits with every step."""
    steps = "".join("<<0.4*0.4=0.2>><<0.2*2=0.4>>" for _ in range(40))
    (reasoning,) = analyse_group("1?", group([f"<<1/3=0.4>>{steps}<<0.4+1=1.4>> #### 1.4"])).reasonings
    assert reasoning.counterfactuals == (None,)


EQUATIONS = st.sampled_from(
    ["<<3*4=12>>", "<<4*3=12>>", "<<12-2=10>>", "<<3+4=7>>", "<<10/4=2.5>>", "<<12+2=15>>", "<<2+2=4>>", "3 + 4 = 7\n",
     "word ", "<<3-3=0>>", "<<4/0=1>>"]
)  # fmt: skip
TEXT = st.builds(
    lambda parts, answer: "".join(parts) + answer,
    st.lists(EQUATIONS, max_size=5),
    st.sampled_from(["\n#### 10", "\n#### 12", "\n#### 7", "\n#### 2.5", ""]),
)
GROUPS = st.lists(TEXT, min_size=2, max_size=8)


@given(GROUPS)
def test_signals_lie_between_0_and_1(texts: list[str]) -> None:
    score = score_group(QUESTION, group(texts))
    for column in (score.s_end, score.s_path, score.s_cf, score.s_wm):
        assert len(column) == len(texts)
        assert all(0 <= value <= 1 for value in column)


@given(GROUPS, st.randoms())
def test_reordering_changes_nothing(texts: list[str], chance: random.Random) -> None:
    """To the last bit, also the question's means."""
    order = list(range(len(texts)))
    chance.shuffle(order)
    first = score_group(QUESTION, group(texts))
    second = score_group(QUESTION, group([texts[i] for i in order]))
    for name in SIGNALS:
        assert [getattr(first, name)[i] for i in order] == getattr(second, name)
        assert first.mean(name) == second.mean(name)


@given(st.integers(2, 8), st.sampled_from(TEXTS))
def test_identical_trajectories_that_carry_their_answer_score_1(size: int, text: str) -> None:
    score = score_group(QUESTION, group([text] * size))
    assert score == GroupScore([1.0] * size, [1.0] * size, [1.0] * size, [1.0] * size)


NAMES = st.text("abcdefghijklmnopqrstuvw", min_size=2, max_size=8)


@given(st.integers(0, 3), NAMES, NAMES)
def test_s_cf_is_blind_to_renaming(index: int, one: str, other: str) -> None:
    """Other words between the equations change no counterfactual."""
    body, _, answer = TEXTS[index].partition("####")
    renamed = f"{one} says {body.replace('>>', f'>> {other} ')}\n####{answer}"
    texts = [*TEXTS[:index], renamed, *TEXTS[index + 1 :]]
    assert score_group(QUESTION, group(texts)).s_cf == score_group(QUESTION, group(TEXTS)).s_cf


@given(st.lists(st.integers(1, 50), min_size=2, max_size=5, unique=True), st.sampled_from("+*"), st.randoms())
def test_s_cf_is_blind_to_commuting_operands(
    numbers: list[int], operation: str, chance: random.Random
) -> None:
    swapped = list(numbers)
    chance.shuffle(swapped)
    value = sum(numbers) if operation == "+" else prod(numbers)
    question = "Given " + " and ".join(map(str, numbers)) + "?"
    texts = [
        f"<<{operation.join(map(str, order))}={value}>>{value} #### {value}" for order in (numbers, swapped)
    ]
    assert score_group(question, group(texts)).s_cf == [1.0, 1.0]


def test_soundness() -> None:
    gold = TEXTS[0]
    views = group([*TEXTS, "It must be #### 10"])
    *found, golds = analyse_group(QUESTION, [*views, *group([gold])]).reasonings
    assert [judge(one, golds) for one in found] == ["sound", "sound", "lucky", "lucky", "unproven"]


def test_texts_with_the_same_equations_score_alike_and_keep_their_places() -> None:
    """They are re-run once; each reasoning still says where its own equations stand."""
    rows = [
        {"text": f"{words}<<3*4=12>>12 <<12-2=10>>10\n#### 10", "answer": "10"}
        for words in ("", "Let us see. ")
    ]
    group = analyse_group(QUESTION, rows)
    first, second = group.reasonings
    assert first.counterfactuals == second.counterfactuals == (14, 13, 9)
    assert first.moves == second.moves == 3
    starts = [[equation.start for equation in one.solution.equations] for one in (first, second)]
    assert starts[1] == [start + len("Let us see. ") for start in starts[0]]
    other = analyse_group(QUESTION, [rows[0], {**rows[1], "answer": "12"}]).reasonings[1]
    assert (other.answer, other.counterfactuals) == ("12", (16, 15, 12))  # another answer, another carrier


def test_the_values_of_equal_trajectories_do_not_depend_on_their_number() -> None:
    """Sums are exact, so that three thirds are one whole however they are grouped."""
    rows = [{"text": text, "answer": "10"} for text in (TEXTS[0], TEXTS[2], TEXTS[2], TEXTS[2])]
    own = [score_group(QUESTION, [rows[0], one]).s_path[0] for one in rows[1:]]
    assert score_group(QUESTION, rows).s_path[0] == math.fsum(own) / 3
