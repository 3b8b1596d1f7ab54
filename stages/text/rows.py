"""The rows of train and Platinum: checks each, drops doubled ones, and drops training questions that Platinum holds.

normalise("What is 1,000 − 5½?")  "what is 1000 - 5 1 / 2"    two questions are one when this is the same
words("What is 1,000 − 5½?")      [what, is, 1, 000, 5, 1, 2]    an overlap is 13 of these in a row
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from html.entities import html5
from typing import Any

import regex

from stages.run.errors import UserError
from stages.text.answers import gold_answer
from stages.text.number import as_ascii

FIELDS = ("question", "answer")  # of a source, as GSM8K names them; its answer is our row's `solution`
GRAM = 13  # words in a row that count as an overlap, as in the GPT-3 paper, appendix C
Row = dict[str, Any]

_ENTITY = regex.compile("&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});")
_THOUSANDS = regex.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_SUPERSCRIPT = regex.compile("[⁰¹²³⁴-⁹⁺⁻]+")
_VULGAR = regex.compile("(?=[¼-¾⅐-⅞])")
_WORD = regex.compile(r"[\p{L}\p{N}][\p{L}\p{M}\p{N}]*+")  # in Hindi a vowel is a mark behind its letter
# A part of a calculation: a number, a letter that stands alone, something in brackets.
_BEFORE = r"(?<=(?:[\d)%]|(?<![\p{L}\p{M}\p{N}])\p{L}) ?)"
_AFTER = r"(?= ?(?:[\d(√]|[-+] ?\d|\.\d|\p{L}(?![\p{L}\p{M}\p{N}])))"
_TERM = regex.compile(
    r"(?<![\p{L}\p{M}\p{N}])\.\d+"  # .5
    rf"|{_WORD.pattern}(?:(?<=\d)[.,](?=\d){_WORD.pattern})*"  # apples, 1.5
    r"|[+^=%±√≤≥≠]"
    rf"|{_BEFORE}(?:\*\*|[-*/<:]|(?<!</?\p{{L}})>){_AFTER}"  # but no dash between words, no bold print, no tag
    r"|(?<![\p{L}\p{M}\p{N}-])-(?=\.?\d)"  # -5
    r"|(?<=\d|[-+*/^=<>√(] ?)\(|\)(?= ?[-+*/^=<>%(]|\d)"  # of a calculation, not of a remark
)


def checked_row(
    identity: str,
    question: object,
    answer: object,
    where: str,
    names: Sequence[str] = FIELDS,
    bare: bool = False,
) -> Row:
    """A row with its gold read, which may be a `bare` number where only the answer counts.

    Raises UserError, beginning with `where` and naming the field, when question or answer is not usable.
    """
    for name, value in zip(names, (question, answer), strict=True):
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{where}: field '{name}' is empty or not text ({value!r:.60})")
        if not value.isascii() and regex.search("[\ud800-\udfff]", value):
            raise UserError(
                f"{where}: field '{name}' holds half a character (a lone surrogate); repair the text"
            )
    _, mark, behind = str(answer).rpartition("####")
    gold = gold_answer(str(answer)) if mark or bare else None
    if gold is None:
        found = f"{behind.strip()[:60]!r} behind the last '####'" if mark else repr(behind.strip()[-40:])
        wanted = "must end in '#### ' and a number with at most a unit"
        if bare:
            wanted = "must be a number with at most a unit, or end in '#### ' and one"
        raise UserError(f"{where}: field '{names[1]}' {wanted}, found {found}; correct or remove this row")
    return {"id": identity, "question": question, "solution": answer, "gold": gold}


def entity(row: Row) -> str | None:
    """An HTML entity such as `&amp;` in a row's texts: what was taken from a web page, and not turned into text."""
    found = (one for name in ("question", "solution") for one in _ENTITY.findall(row[name]))
    return next((one for one in found if one[1] == "#" or one[1:] in html5), None)


def words(text: str) -> list[str]:
    """The words and numbers of a text, without case: Unicode NFKC, each a letter or digit with what belongs to it."""
    return _WORD.findall(_plain(text))


def normalise(text: str) -> str:
    """`text` as compared with others: its words, numbers, signs and operators, one space between them.

    Case, spaces, punctuation, currency signs and the commas of thousands make no other question; a minus does.
    """
    text = regex.sub(r"[\p{Sc}\\]", "", _plain(text))
    text = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    return " ".join(_TERM.findall(text))


def _plain(text: str) -> str:
    text = _VULGAR.sub(" ", _SUPERSCRIPT.sub(r"^\g<0>", text))  # NFKC makes 2 of ², and 51⁄2 of 5½
    text = as_ascii(unicodedata.normalize("NFKC", as_ascii(text))).casefold().replace("÷", "/")
    return " ".join(regex.sub(r"\p{Cf}", "", text).split())  # Cf is invisible: soft hyphens, joiners


def grams(words: list[str]) -> set[str]:
    """All runs of 13 words; none when there are fewer."""
    return {" ".join(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)}


class Overlap:
    """What a question may not share with the held-out rows."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        questions = [row["question"] for row in rows]
        self.texts = {normalise(question) for question in questions}
        self.grams: set[str] = set().union(*(grams(words(question)) for question in questions))


@dataclass
class Cleaner:
    """Drops what was seen before and what is held out, and counts it."""

    overlap: Overlap = field(default_factory=Overlap)
    counts: Counter[str] = field(default_factory=Counter)
    golds: dict[str, str] = field(default_factory=dict)  # by normalised question

    def clean(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield the rows to keep, in order."""
        for row in rows:
            self.counts["read"] += 1
            text = normalise(row["question"])
            if text in self.golds:
                self.counts["duplicates"] += 1
                self.counts["conflicts"] += row["gold"] != self.golds[text]
                continue
            self.golds[text] = row["gold"]
            if text in self.overlap.texts:
                self.counts["exact"] += 1
            elif not self.overlap.grams.isdisjoint(grams(words(row["question"]))):
                self.counts["gram"] += 1
            else:
                yield row


def apart(rows: Sequence[Row], others: Sequence[Row]) -> list[Row]:
    """The `rows` that are none of `others` and share no 13 words in a row with one; each text once."""
    far = {row["id"] for row in Cleaner(Overlap(rows)).clean(others)}
    near = Overlap(row for row in others if row["id"] not in far)
    return list(Cleaner(near).clean(rows))


def pick_validation(rows: Iterable[Row], count: int, seed: int) -> set[str]:
    """The ids of `count` rows for validation: those with the smallest hash of (seed, id).

    A row's hash does not depend on other rows. When k rows come or go, at most k of the chosen ones change.
    """

    def rank(identity: str) -> bytes:
        return hashlib.sha256(f"{seed}/{identity}".encode()).digest()

    return set(sorted((row["id"] for row in rows), key=rank)[:count])
