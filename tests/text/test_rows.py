"""Rows of train and Platinum: a bad one is refused, doubled and held-out questions are found and counted."""

from __future__ import annotations

from typing import Any

import pytest

from stages.run.errors import UserError
from stages.text.rows import Cleaner, Overlap, checked_row, entity, grams, normalise, words

LONG = (
    "A train leaves the old station at noon and travels sixty miles an hour for three hours. How far is it?"
)


def row(identity: str, question: str, answer: str = "#### 1") -> dict[str, Any]:
    return checked_row(identity, question, answer, "here")


@pytest.mark.parametrize(
    ("question", "answer", "message"),
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
def test_a_bad_row_is_refused(question: object, answer: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        checked_row("train-00000", question, answer, "here")


@pytest.mark.parametrize(
    "gold",
    [
        "12,50",
        "2 hours 30 minutes",
        "5 and 7",
        "5 or 7",
        "3:5",
        "2x",
        "5 + 3",
        "6*7",
        "no 5 or so, 6",
        "x = y",
    ],
)
def test_a_gold_that_is_more_than_a_number_and_a_unit_is_refused(gold: str) -> None:
    """Half of it would be a wrong gold. The line says what stands there, and what to do."""
    with pytest.raises(UserError) as caught:
        checked_row("train-00000", "Why?", f"5*3 = 15, #### 15 at first.\n#### {gold}\n", "q.jsonl:7")
    assert str(caught.value) == (
        "q.jsonl:7: field 'answer' must end in '#### ' and a number with at most a unit, found "
        f"{gold!r} behind the last '####'; correct or remove this row"
    )


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
    shared = words(LONG)
    exact = row("exact", LONG.upper().replace(".", " ;"))
    thirteen = row("13", "Once upon a time: " + " ".join(shared[2:15]) + " and back?")
    twelve = row("12", "Once upon a time: " + " ".join(shared[2:14]) + " and back?")
    cleaner = Cleaner(Overlap([row("held", LONG)]))
    assert list(cleaner.clean([exact, thirteen, twelve])) == [twelve]
    assert (cleaner.counts["exact"], cleaner.counts["gram"]) == (1, 1)


def test_grams() -> None:
    """Runs of 13 words; a shorter text has none."""
    assert len(grams(words(LONG))) == len(words(LONG)) - 12
    assert grams(["a", "b", "c"]) == set()


DIFFERENT = [
    (
        "What is 5 + 3?",
        "What is 5 - 3?",
        "What is 5 * 3?",
        "What is 5 / 3?",
        "What is 5 ^ 3?",
        "What is 5 ** 3?",
    ),
    ("What is 5 + 3?", "What is -5 + 3?", "What is 5 + -3?"),
    (
        "How much is 1.5 in all?",
        "How much is 15 in all?",
        "How much is 1,5 in all?",
        "How much is .15 in all?",
    ),
    ("How much is 50% in all?", "How much is 50 in all?"),
    ("What is (2 + 3) * 4?", "What is 2 + (3 * 4)?", "What is 2 + 3 * 4?"),
    ("What is 2(3 + 4)?", "What is 2 3 + 4?"),
    ("Is x < 5?", "Is x > 5?", "Is x = 5?", "Is x ≤ 5?"),
    ("What is x²?", "What is x2?", "What is x³?"),
    ("What is 2 ½ cups?", "What is 21 2 cups?"),
    ("What is 3:5?", "What is 3.5?", "What is 35?"),
    ("What is x - y?", "What is x + y?", "What is x y?"),
    ("What is √9?", "What is 9?"),
]


@pytest.mark.parametrize("questions", DIFFERENT)
def test_signs_operators_points_and_percent_make_another_question(questions: tuple[str, ...]) -> None:
    rows = [row(question, question) for question in questions]
    assert list(Cleaner().clean(rows)) == rows
    held_out = Cleaner(Overlap(rows[:1]))
    assert list(held_out.clean(rows)) == rows[1:]


ALIKE = [
    ("What is 5 + 3?", "what is 5+3 .", "What is 5 ＋ 3"),
    ("What is 5 − 3?", "What is 5-3?", "What is 5 – 3?"),
    ("What is 6 ÷ 2?", "What is 6/2?", "What is 6 ∕ 2?"),
    ("What is 6 × 2?", "What is 6 * 2?", "What is 6 ⋅ 2?"),
    ("Ann has 1,000 apples.", "Ann has 1000 apples"),
    ("Ann (8) has 5 (five) apples -- **all** 5 red.", "Ann, 8, has 5, five, apples: all 5 red"),
    ("A five-year-old eats ice-cream and/or cake.", "A five year old eats ice cream and or cake"),
    ("It costs $5, and <b>not</b> 50%.", "It costs 5 and b not b 50 %"),
    ("What is 2½?", "What is 2 1/2?"),
    ("What is x²?", "What is x^2?"),
    ("What is १५ + २?", "What is 15 + 2?"),
    ("cre\u0301me is so\u00adft", "CRÉME is soft"),
]


@pytest.mark.parametrize("questions", ALIKE)
def test_spelling_makes_no_other_question(questions: tuple[str, ...]) -> None:
    assert len({normalise(question) for question in questions}) == 1


def test_a_word_is_its_letters_with_their_marks() -> None:
    """Vowels of Hindi are marks behind a letter. Cut off there, these eleven words in common were more than 13."""
    held = "दुकान में रोज़ कितने रुपये की बिक्री होती है यदि एक सेब 5 रुपये का है?"
    other = "दुकान में रोज़ कितने रुपये की बिक्री होती है यदि एक केला 7 रुपये का है?"
    assert len(words(held)) == 16
    assert Overlap([row("held", held)]).grams == grams(held.rstrip("?").split())
    kept = row("other", other)
    assert list(Cleaner(Overlap([row("held", held)])).clean([kept])) == [kept]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Tom &amp; Ann have 5?", "&amp;"),
        ("Ann&#39;s 5?", "&#39;"),
        ("5&nbsp;apples?", "&nbsp;"),
        ("5 &#xA0;?", "&#xA0;"),
        ("R&D; Q&Answer; 5 & 3; AT&T?", None),
    ],
)
def test_html_entities_are_found_and_kept(text: str, found: str | None) -> None:
    assert entity(row("a", text)) == found
    assert entity(row("a", "Why?", f"{text}\n#### 1")) == found
    assert row("a", text)["question"] == text
