"""`python -m stages pairs`: some preference pairs side by side, with what differs marked.

    chosen                              rejected
    <<6*4=[24]>>[24] pencils            <<6*4=[22]>>[22] pencils

On a terminal with colours the marks are colours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import SequenceMatcher
from pathlib import Path
from random import Random

from rich.console import Console
from rich.text import Text

from stages.regime_w.pairs import KINDS
from stages.regime_w.signals import SIGNALS
from stages.run.errors import UserError
from stages.run.files import read_jsonl
from stages.run.paths import PAIRS
from stages.tools.show import Row, cell, new_console, new_table

SIDES = ("chosen", "rejected")
# A number, a word, white space, or a sign.
_PART = re.compile(r"[0-9]+(?:[.,][0-9]+)*|[^\W\d_]+|[^\S\n]+|.", re.DOTALL)
MAX_CELLS = 400_000  # words of one side times words of the other; text that repeats itself takes far longer
Piece = tuple[str, bool]


def main(
    pairs: Path = PAIRS,
    sample: int = 5,
    kind: str | None = None,
    question: str | None = None,
    seed: int = 0,
    console: Console | None = None,
) -> None:
    """Print `sample` pairs of a file, drawn by `seed`, of one `kind` and one `question` only if given.

    Raises UserError when the file has no such pair.
    """
    if kind is not None and kind not in KINDS:
        raise UserError(f"--kind: '{kind}' is unknown; choose one of {', '.join(sorted(KINDS))}")
    wanted = {key: value for key, value in (("kind", kind), ("question_id", question)) if value}
    fields = dict.fromkeys((*SIDES, *wanted), str)
    rows = [row for row in read_jsonl(pairs, fields) if all(row[key] == wanted[key] for key in wanted)]
    if not rows:
        of_kind = f" of kind {kind}" if kind else ""
        of_question = f" from question '{question}'" if question else ""
        hint = "; `python -m stages explain` says why a question gave none" if question else ""
        raise UserError(f"{pairs}: holds no pairs{of_kind}{of_question}{hint}")
    console = console or new_console()
    drawn = sorted(Random(seed).sample(range(len(rows)), min(sample, len(rows))))
    for place, index in enumerate(drawn, 1):
        show(rows[index], f"{place} of {len(drawn)}, {len(rows):,} in all", console)


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
    ids = [str(pair.get(f"{side}_id") or side) for side in SIDES]
    margin = "" if pair.get("margin") is None else f", margin {cell(pair['margin'], '.3f')}"
    heading = (f"{pair.get('kind') or 'pair'} {ids[0]} > {ids[1]}", "bold")
    console.print(Text.assemble(heading, margin, f" ({place})"))
    if isinstance(pair.get("prompt"), str):
        console.print(pair["prompt"], style="italic")
    table = new_table("", *SIDES, expand=True)
    table.columns[0].width, table.columns[0].style = 8, "dim"
    for column in table.columns[1:]:
        column.ratio = 1
    plain = console.color_system is None
    marked = zip(differences(pair["chosen"], pair["rejected"]), ("green", "red"), strict=True)
    table.add_row("", *(_marked(side, style, plain) for side, style in marked))
    table.add_section()
    for label, chosen, rejected in facts(pair):
        table.add_row(label, chosen, rejected)
    console.print(table)


def _marked(pieces: list[Piece], style: str, plain: bool) -> Text:
    """A text with what the other lacks in colour, or in [ ] without colours; line ends stay outside."""
    text = Text()
    for piece, differs in pieces:
        for part in re.split(r"(\n+)", piece):
            if differs and part.strip("\n"):
                text.append(f"[{part}]" if plain else part, "" if plain else f"bold reverse {style}")
            else:
                text.append(part)
    return text


def facts(pair: Row) -> Iterator[tuple[str, str, str]]:
    """Rewards, signals and lengths of both sides, as far as the file has them."""
    rows = []
    for side in SIDES:
        signals = pair.get(f"{side}_signals")
        rows.append({"reward": pair.get(f"{side}_reward"), **(signals if isinstance(signals, dict) else {})})
    for label in ("reward", *SIGNALS):
        chosen, rejected = (row.get(label) for row in rows)
        if (chosen, rejected) != (None, None):
            yield label, cell(chosen, ".3f"), cell(rejected, ".3f")
    chosen, rejected = (pair.get(f"{side}_tokens") for side in SIDES)
    if isinstance(chosen, int) and isinstance(rejected, int):
        yield "tokens", f"{chosen:,} ({chosen - rejected:+,})", f"{rejected:,}"
    else:
        yield "length", f"{len(pair['chosen']):,} characters", f"{len(pair['rejected']):,} characters"
    if pair.get("rejected_finish") == "length":
        yield "finish", "", "cut off"
