"""Answers, family 2: which statement of a completion is its answer; strict before flexible."""

from __future__ import annotations

import pytest

from stages.text.answers import read_answer


@pytest.mark.parametrize(
    ("completion", "strict", "flexible"),
    [
        ("9*2=18\n#### 18", "18", "18"),
        ("9*2=18\n#### $18.00 dollars.\n", "18", "18"),
        ("####18", "18", "18"),
        ("#### \n18", "18", "18"),
        ("#### 18\n#### 19", "18", "18"),
        (r"So \boxed{5}, no: \boxed{\frac{1}{2}}.", "0.5", "0.5"),
        (r"\boxed{\text{she makes } \$18}", "18", "18"),
        (r"\boxed{7} #### 8", "8", "8"),
        ("The answer is 18.", "18", "18"),
        ("The final answer is: **$1,018**. Bye 3.", "1018", "1018"),
        ("**Answer:** 18 eggs", "18", "18"),
        ("A: 1,000", "1000", "1000"),
        ("Store B and A: 5 eggs", None, "5"),
        ("The answer is unclear. The answer is 3 + 4 = 7", "7", "7"),
        ("It is 16-3 and that makes 13 eggs", None, "13"),
        ("from 10 - 3 we get to -4 degrees", None, "-4"),
        ("#### infinite, or 7", None, "7"),
        ("#### 1. Count the eggs\n3*4=12\n#### 2. Subtract\n\\boxed{9}", "9", "9"),
        ("no number", None, None),
        ("", None, None),
    ],
)
def test_order_of_statements(completion: str, strict: str | None, flexible: str | None) -> None:
    reading = read_answer(completion)
    assert (reading.answer, reading.flexible_answer) == (strict, flexible)


def test_second_answers_are_counted() -> None:
    assert read_answer("#### 1").found == 1
    assert read_answer("#### 1\nTom has 3.\n#### 2").found == 2
    assert read_answer(r"\boxed{1} so \boxed{1}").found == 1
    assert read_answer("nothing 3").found == 0


def test_empty() -> None:
    assert read_answer(" \n").empty
    assert not read_answer("3").empty


@pytest.mark.parametrize(
    ("completion", "strict"),
    [
        ("<think>so 42, #### 42, \\boxed{41}</think>\nShe has 18.\n#### 18", "18"),
        ("<think>a</think> 5 </think> The answer is 6", "6"),
        ("thinking 42</think>\\boxed{18}", "18"),
        ("<think>the answer is 42. #### 42", None),
        ("<think>a</think>#### 18\nQuestion: b?\n<think>c</think>#### 42", "18"),
    ],
)
def test_thinking_is_not_looked_at(completion: str, strict: str | None) -> None:
    assert read_answer(completion).answer == strict
