"""`python -m stages pairs`: some preference pairs side by side, with what differs marked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import SequenceMatcher
from pathlib import Path
from random import Random

from rich.console import Console
from rich.text import Text

from stages.regime_w.record import Kinds, count, name, number, same_id, text, typed
from stages.regime_w.signals import SIGNALS
from stages.run.errors import UserError
from stages.run.files import FieldTypes, read_numbered_jsonl
from stages.run.paths import LAST
from stages.tools.show import Row, cell, new_console, new_table

SIDES = ("chosen", "rejected")
PAIR_FIELDS: FieldTypes = {
    **{"id": str, "kind": str, "question_id": str, "prompt": str},
    **{f"{side}{end}": str for side in SIDES for end in ("", "_id")},
}
KINDS: Kinds = {
    **dict.fromkeys(("id", "question_id", "chosen_id", "rejected_id"), name),
    **dict.fromkeys(("kind", "prompt", *SIDES, "rejected_finish"), text),
    **dict.fromkeys(("margin", "chosen_reward", "rejected_reward"), number),
    **dict.fromkeys(("chosen_tokens", "rejected_tokens"), count),
}
# A number, a word, white space, or a sign.
_PART = re.compile(r"[0-9]+(?:[.,][0-9]+)*|[^\W\d_]+|[^\S\n]+|.", re.DOTALL)
MAX_CELLS = 400_000  # words of one side times words of the other; text that repeats itself takes far longer
Piece = tuple[str, bool]


def main(
    pairs: Path = LAST.pairs,
    sample: int = 5,
    kind: str | None = None,
    question: str | None = None,
    seed: int = 0,
) -> None:
    """Print `sample` pairs of a file, drawn by `seed`, of one `kind` and one `question` only if given.

    Raises UserError when the file has no such pair.
    """
    rows = [
        row
        for row in read_pairs(pairs)
        if kind in (None, row["kind"]) and question in (None, row["question_id"])
    ]
    if not rows:
        of_kind = f" of kind {kind}" if kind else ""
        of_question = f" from question '{question}'" if question else ""
        hint = "; `python -m stages explain` says why a question gave none" if question else ""
        raise UserError(f"{pairs}: holds no pairs{of_kind}{of_question}{hint}")
    drawn = sorted(Random(seed).sample(range(len(rows)), min(sample, len(rows))))
    for place, index in enumerate(drawn, 1):
        show(rows[index], f"{place} of {len(drawn)}, {len(rows):,} in all", new_console())


def read_pairs(path: Path) -> Iterator[Row]:
    """Yield the pairs of a file, typed as rollouts are (stages/regime_w/record.py).

    Raises UserError with file, line, pair and field for a value that cannot be used, and for an id that is there twice.
    """
    lines: dict[str, int] = {}
    for line, record in read_numbered_jsonl(path):
        where = f"{path}:{line}" + (f": pair {record['id']!r:.60}" if "id" in record else "")
        signals = [f"{side}_signals" for side in SIDES]
        pair = typed(record, KINDS, where, (*PAIR_FIELDS, *signals))
        if pair["id"] in lines:
            raise same_id(path, lines[pair["id"]], line, pair["id"])
        lines[pair["id"]] = line
        for key in signals:
            pair[key] = typed(pair[key], dict.fromkeys(SIGNALS, number), f"{where}, {key}")
        yield pair


# ---- what differs ------------------------------------------------------------------------------------


def differences(a: str, b: str) -> tuple[list[Piece], list[Piece]]:
    """Both texts in pieces, each with whether the other text lacks it; the pieces of a text add up to it.

    Lines are compared first, then the words of those that differ: quick for thousands of lines.
    """
    pieces = list(_compare(a.splitlines(keepends=True), b.splitlines(keepends=True), by_line=True))
    left = [(one, differs) for one, _, differs in pieces if one]
    return left, [(one, differs) for _, one, differs in pieces if one]


def _compare(left: list[str], right: list[str], by_line: bool = False) -> Iterator[tuple[str, str, bool]]:
    for tag, i, j, k, m in SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        a, b = "".join(left[i:j]), "".join(right[k:m])
        words = _PART.findall(a), _PART.findall(b)
        if by_line and tag == "replace" and len(words[0]) * len(words[1]) <= MAX_CELLS:
            yield from _compare(*words)
        else:
            yield a, b, tag != "equal"


# ---- showing it --------------------------------------------------------------------------------------


def show(pair: Row, place: str, console: Console) -> None:
    """Print one pair; fits the console's width."""
    heading = f"{pair['kind']} {pair['chosen_id']} > {pair['rejected_id']}"
    margin = cell(pair.get("margin"), ".3f")
    console.print(Text.assemble((heading, "bold"), f", margin {margin} ({place})"))
    console.print(pair["prompt"], style="italic")
    table = new_table("", *SIDES, expand=True)
    table.columns[0].width, table.columns[0].style = 8, "dim"
    for column in table.columns[1:]:
        column.ratio = 1
    marked = zip(differences(pair["chosen"], pair["rejected"]), ("green", "red"), strict=True)
    table.add_row("", *(_marked(side, style) for side, style in marked))
    table.add_section()
    for label, chosen, rejected in facts(pair):
        table.add_row(label, chosen, rejected)
    console.print(table)


def _marked(pieces: list[Piece], style: str) -> Text:
    """A text with what the other lacks in [ ] and in colour; line ends stay outside."""
    text = Text()
    for piece, differs in pieces:
        for part in re.split(r"(\n+)", piece):
            if differs and part.strip("\n"):
                text.append(f"[{part}]", style)
            else:
                text.append(part)
    return text


def facts(pair: Row) -> Iterator[tuple[str, str, str]]:
    """Rewards, signals and lengths of both sides."""
    rows = [{"reward": pair.get(f"{side}_reward"), **pair[f"{side}_signals"]} for side in SIDES]
    for label in ("reward", *SIGNALS):
        yield label, cell(rows[0].get(label), ".3f"), cell(rows[1].get(label), ".3f")
    chosen, rejected = (pair.get(f"{side}_tokens") for side in SIDES)
    if chosen is not None and rejected is not None:
        yield "tokens", f"{chosen:,} ({chosen - rejected:+,})", f"{rejected:,}"
    if pair.get("rejected_finish") == "length":
        yield "finish", "", "cut off"
