"""Answers, family 4: reading is linear in the text's length on any input, and never raises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.text.answers import read_answer

PIECES = [
    "9", "9 ", "1,", "1,000,", "12 345 ", "####", "#### 1 ", "#### 1. a", "\\boxed{", "\\boxed{1}", "}", "{",
    "$", "-", "- ", "The answer is ", "Answer:", "\nA:", "A", "nswer", "Question:", "\nQ:", "<think>",
    "</think>", " ", "\n", "1/", "½", "９", "\\frac{", "=", "1=", "1+", ".", "**", "<|im_start|>", "</s>",
]  # fmt: skip


@pytest.mark.parametrize("piece", PIECES)
def test_time_grows_with_length_only(piece: str, ends_soon: Callable[[Callable[[], object]], bool]) -> None:
    """400,000 characters of anything are read; a quadratic reader would not get to their end."""
    text = (piece * (400_000 // len(piece) + 1))[:400_000]
    assert ends_soon(lambda: read_answer(text, "How many?"))


@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5)), max_size=40))
def test_no_text_makes_it_raise(pieces: list[str]) -> None:
    text = "".join(pieces)
    reading = read_answer(text, "How many?")
    assert 0 <= reading.start <= len(text)
    assert 0 <= reading.end <= len(text)
    assert reading.answer is None or reading.answer == reading.flexible_answer
