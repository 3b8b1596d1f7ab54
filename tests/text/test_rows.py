"""Rows of train and Platinum: a bad one is refused, doubled and held-out questions are found and counted."""

from __future__ import annotations

from typing import Any

import pytest

from stages.run.errors import UserError
from stages.text.rows import Cleaner, Overlap, checked_row, grams, normalise

LONG = (
    "A train leaves the old station at noon and travels sixty miles an hour for three hours. How far is it?"
)


def row(identity: str, question: str, answer: str = "#### 1") -> dict[str, Any]:
    return checked_row(identity, question, answer, "here")


@pytest.mark.parametrize(
    ("question", "answer", "words"),
    [
        (" ", "#### 1", "here: field 'question' is empty or not text"),
        (5, "#### 1", "here: field 'question' is empty or not text"),
        ("Why?", "", "here: field 'answer' is empty or not text"),
        ("Why \ud83d?", "#### 1", "here: field 'question' holds half a character"),
        ("Why?", "It is 3.", "here: field 'answer' must end in '#### ' and a number"),
        ("Why?", "3\n#### three", "here: field 'answer' must end in '#### ' and a number"),
        ("Why?", "3\n#### ", "here: field 'answer' must end in '#### ' and a number"),
    ],
)
def test_a_bad_row_is_refused(question: object, answer: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        checked_row("train-00000", question, answer, "here")


@pytest.mark.parametrize(
    ("gold", "wanted"), [("$1,000.00", "1000"), (" -3", "-3"), ("0.50", "0.5"), ("1/2", "0.5")]
)
def test_gold_is_canonical(gold: str, wanted: str) -> None:
    """One way to write a number, the one all stages compare."""
    assert row("a", "Why?", f"So.\n####{gold}")["gold"] == wanted


def test_duplicates_are_found_after_normalisation_and_the_first_kept() -> None:
    """Case, punctuation, white space and full-width forms make no other question; another gold is counted."""
    first = row("a", "Ann has 1 apples and eats one. How many are left?", "#### 0")
    again = row("b", "  ANN has １ apples -- and eats one!\nHow many are left", "#### 7")
    cleaner = Cleaner()
    assert list(cleaner.clean([first, again, first])) == [first]
    assert (cleaner.counts["read"], cleaner.counts["duplicates"], cleaner.counts["conflicts"]) == (3, 2, 1)


def test_exact_and_13gram_overlap_are_removed_and_counted_apart() -> None:
    """The same question in other clothes is exact; 13 shared words in a row are a 13-gram; 12 are neither."""
    words = normalise(LONG).split()
    exact = row("exact", LONG.upper().replace(".", " ;"))
    thirteen = row("13", "Once upon a time: " + " ".join(words[2:15]) + " and back?")
    twelve = row("12", "Once upon a time: " + " ".join(words[2:14]) + " and back?")
    cleaner = Cleaner(Overlap([row("held", LONG)]))
    assert list(cleaner.clean([exact, thirteen, twelve])) == [twelve]
    assert (cleaner.counts["exact"], cleaner.counts["gram"]) == (1, 1)


def test_grams() -> None:
    """Runs of 13 words; a shorter text has none."""
    assert len(grams(normalise(LONG))) == len(normalise(LONG).split()) - 12
    assert grams("a b c") == set()
    assert normalise("“Ça”, x_2½!") == "ça x 21 2"
