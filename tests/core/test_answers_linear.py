"""Answers, family 4: reading is linear in the text's length on any input, and never raises."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.core.answers import read_answer

PIECES = [
    "9",
    "9 ",
    "1,",
    "1,000,",
    "12 345 ",
    "####",
    "#### 1 ",
    "#### 1. a",
    "\\boxed{",
    "\\boxed{1}",
    "}",
    "{",
    "$",
    "-",
    "- ",
    "The answer is ",
    "Answer:",
    "\nA:",
    "A",
    "nswer",
    "Question:",
    "\nQ:",
    "<think>",
    "</think>",
    " ",
    "\n",
    "1/",
    "½",
    "９",
    "\\frac{",
    "=",
    "1=",
    "1+",
    ".",
    "**",
    "<|im_start|>",
    "</s>",
]


@pytest.mark.parametrize("piece", PIECES)
def test_time_grows_with_length_only(piece: str) -> None:
    """Eight times the text takes about eight times as long; a quadratic reader would take 64 times."""

    def seconds(size: int) -> float:
        text = (piece * (size // len(piece) + 1))[:size]
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            read_answer(text, "How many?")
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(160_000) < 30 * seconds(20_000) + 0.02


@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5)), max_size=40))
def test_no_text_makes_it_raise(pieces: list[str]) -> None:
    text = "".join(pieces)
    reading = read_answer(text, "How many?")
    assert 0 <= reading.start <= len(text)
    assert 0 <= reading.end <= len(text)
    assert reading.answer is None or reading.answer == reading.flexible_answer
