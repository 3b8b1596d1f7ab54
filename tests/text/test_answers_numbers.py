"""Answers, family 1: a number is read as a person reads it, exactly, and never by evaluating text."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.text.answers import canonical, gold_answer, parse_number, same_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$1,200", "1200"),
        ("70 000", "70000"),
        ("70\u202f000", "70000"),
        ("$-38,000", "-38000"),
        ("-$5", "-5"),
        ("−5", "-5"),
        ("18 dollars.", "18"),
        ("1/2", "0.5"),
        (".5", "0.5"),
        ("0.50", "0.5"),
        ("20%", "20"),
        ("20", "20"),
        ("１８", "18"),
        ("**18**", "18"),
        (r"\boxed{18}", "18"),
        (r"\$18", "18"),
        ("3.0", "3"),
        ("1,000.", "1000"),
        ("1 1/2", "1.5"),
        ("2½", "2.5"),
        (r"\frac{1}{2}", "0.5"),
        (r"-\dfrac{3}{4}", "-0.75"),
        (r"1{,}200", "1200"),
        ("€5", "5"),
        ("1/3", "1/3"),
        ("-2/6 of a pie", "-1/3"),
        ("9*2 = 18", "18"),
        ("x = 5", "5"),
        ("2 million", "2000000"),
        ("1e3", "1000"),
        ("3:00 PM", "3"),
        ("-0", "0"),
        ("007", "7"),
        (r"\boxed{18\text{ dollars}}", "18"),
        ("= $18.50", "18.5"),
    ],
)
def test_number_is_read_as_a_person_would(text: str, expected: str) -> None:
    value = parse_number(text)
    assert value is not None
    assert canonical(value) == expected


@pytest.mark.parametrize(
    "text", ["", "infinite", "7:30", "1.2.3", "1/0", "1,5", "16 - 3", "5-10", "$", "####", "9" * 400]
)
def test_what_is_no_number_is_none(text: str) -> None:
    assert parse_number(text) is None


def test_longest_number_is_exact() -> None:
    assert parse_number("9" * 399) == int("9" * 399)


@given(st.fractions(max_denominator=10**6))
def test_canonical_form_is_the_same_number(value: Fraction) -> None:
    """What is written as an answer reads back as exactly the same number."""
    assert parse_number(canonical(value)) == value


@given(
    st.integers(-(10**12), 10**12),
    st.sampled_from(["{:,}", "${:,}", "{:,}.00", "{} eggs.", "**{}**", r"\boxed{{{}}}"]),
)
def test_decorations_do_not_change_the_number(value: int, form: str) -> None:
    assert parse_number(form.format(value)) == value


def test_gold_is_what_follows_the_last_mark_or_a_bare_number() -> None:
    assert gold_answer("20 loaves of 3, #### 5 is wrong\n#### 1,450,000") == "1450000"
    assert gold_answer("18") == "18"
    assert gold_answer("20 people\n<<20/2=10>>10\nA: 10") == "10"
    assert gold_answer("#### none") is None


def test_absent_answers_equal_nothing() -> None:
    assert same_answer("1/3", "1/3")
    assert not same_answer(None, None)
    assert not same_answer("1", None)
