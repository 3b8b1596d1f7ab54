"""The rows of train and Platinum: checks each, drops doubled ones, and drops training questions that Platinum holds."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from stages.run.errors import UserError
from stages.text.answers import gold_answer

FIELDS = ("question", "answer")  # of a source, as GSM8K names them; its answer is our row's `solution`
GRAM = 13  # words in a row that count as an overlap, as in the GPT-3 paper, appendix C
Row = dict[str, Any]


def checked_row(identity: str, question: object, answer: object, where: str) -> Row:
    """A row with its gold read. Raises UserError, beginning with `where`, when question or answer is not usable."""
    for name, value in zip(FIELDS, (question, answer), strict=True):
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{where}: field '{name}' is empty or not text ({value!r:.60})")
        if not value.isascii() and re.search("[\ud800-\udfff]", value):
            raise UserError(
                f"{where}: field '{name}' holds half a character (a lone surrogate); repair the text"
            )
    gold = gold_answer(str(answer)) if "####" in str(answer) else None
    if gold is None:
        raise UserError(
            f"{where}: field 'answer' must end in '#### ' and a number, found {str(answer).strip()[-40:]!r}; "
            "correct or remove this row"
        )
    return {"id": identity, "question": question, "solution": answer, "gold": gold}


def normalise(text: str) -> str:
    """`text` as compared with others: Unicode NFKC, case folded, only its words, one space between them."""
    return " ".join(re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold()))


def grams(text: str) -> set[str]:
    """All runs of 13 words of a normalised text; none when it is shorter."""
    words = text.split()
    return {" ".join(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)}


class Overlap:
    """What a question may not share with the held-out rows."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self.texts = {normalise(row["question"]) for row in rows}
        self.grams: set[str] = set().union(*map(grams, self.texts))


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
            elif not self.overlap.grams.isdisjoint(grams(text)):
                self.counts["gram"] += 1
            else:
                yield row
