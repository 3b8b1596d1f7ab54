"""`python -m stages pairs`: some preference pairs side by side, with what differs marked.

    chosen                              rejected
    <<6*4=[24]>>[24] pencils            <<6*4=[22]>>[22] pencils

On a terminal with colours the marks are colours. The file is read once, and only what is shown is kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import SequenceMatcher
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from stages.core.errors import UserError
from stages.core.records import Fields, read_jsonl
from stages.preference import KINDS, SIGNALS
from stages.tools.explain import NUMBER, PAIRS, check_optional

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

SIDES = ("chosen", "rejected")
FIELDS = {"chosen": str, "rejected": str}
OPTIONAL: Fields = {
    **{f"{side}_reward": NUMBER for side in SIDES},
    **{f"{side}_tokens": int for side in SIDES},
    **{f"{side}_signals": dict for side in SIDES},
    "margin": NUMBER,
}
# A word, number or sign, with the white space before it.
_WORD = re.compile(r"(\s*)([^\W\d_]+|[0-9]+(?:[.,][0-9]+)*|[\W\d_]|\Z)")
MAX_CELLS = 250_000  # words of one text times words of the other; time grows with it, and faster
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
    found, total = draw(chosen_from(pairs, kind, question), sample, seed)
    if not found:
        of_kind = f" of kind {kind}" if kind else ""
        of_question = f" from question '{question}'" if question else ""
        raise UserError(
            f"{pairs}: holds no pairs{of_kind}{of_question}"
            + ("; `python -m stages explain` says why a question gave none" if question else "")
        )
    from rich.console import Console

    for pair in found:
        where = f"{pairs}: pair '{pair.get('id', '')}'"
        check_optional(pair, OPTIONAL, where)
        for side in SIDES:
            check_optional(pair.get(f"{side}_signals") or {}, dict.fromkeys(SIGNALS, NUMBER), where)
    console = console or Console(highlight=False)
    for place, pair in enumerate(found, 1):
        show(pair, f"{place} of {len(found)}, {total:,} in all", console)


def chosen_from(path: Path, kind: str | None, question: str | None) -> Iterator[dict[str, Any]]:
    """The pairs of a file that are of this kind and question, as far as these are given."""
    fields = {**FIELDS, **({"kind": str} if kind else {}), **({"question_id": str} if question else {})}
    for pair in read_jsonl(path, fields):
        if (kind is None or pair["kind"] == kind) and (question is None or pair["question_id"] == question):
            yield pair


def draw(pairs: Iterator[dict[str, Any]], size: int, seed: int) -> tuple[list[dict[str, Any]], int]:
    """`size` pairs drawn uniformly in one pass, in the file's order, and how many there were (Vitter's R)."""
    random = Random(seed)
    kept: list[tuple[int, dict[str, Any]]] = []
    total = 0
    for place, pair in enumerate(pairs):
        total += 1
        if len(kept) < size:
            kept.append((place, pair))
        elif (slot := random.randrange(total)) < size:
            kept[slot] = (place, pair)
    return [pair for _, pair in sorted(kept, key=lambda one: one[0])], total


def differences(a: str, b: str) -> tuple[list[Piece], list[Piece]]:
    """Both texts in pieces, each with whether the other text lacks it; the pieces of a text add up to it.

    By words; in long texts by lines first, then by words within the lines that differ.
    """
    left, right = _WORD.findall(a), _WORD.findall(b)
    if len(left) * len(right) <= MAX_CELLS:
        return _by_words(left, right)
    sides: tuple[list[Piece], list[Piece]] = ([], [])
    rows = (a.splitlines(keepends=True), b.splitlines(keepends=True))
    for tag, i, j, k, m in SequenceMatcher(None, *rows).get_opcodes():
        blocks = ["".join(rows[0][i:j]), "".join(rows[1][k:m])]
        words = [_WORD.findall(block) for block in blocks]
        if tag == "replace" and len(words[0]) * len(words[1]) <= MAX_CELLS:
            pieces = _by_words(*words)
        else:
            pieces = ([(blocks[0], tag != "equal")], [(blocks[1], tag != "equal")])
        for side, more in zip(sides, pieces, strict=True):
            side += [piece for piece in more if piece[0]]
    return sides


def _by_words(left: list[tuple[str, str]], right: list[tuple[str, str]]) -> tuple[list[Piece], list[Piece]]:
    """`differences` of texts taken apart; white space counts only between words that are the same."""
    sides: tuple[list[Piece], list[Piece]] = ([], [])
    cores = [word for _, word in left], [word for _, word in right]
    for tag, i, j, k, m in SequenceMatcher(None, *cores, autojunk=False).get_opcodes():
        if tag == "equal":
            for (space, word), (other, _) in zip(left[i:j], right[k:m], strict=True):
                sides[0].extend([(space, space != other), (word, False)])
                sides[1].extend([(other, space != other), (word, False)])
        else:
            for side, words in zip(sides, (left[i:j], right[k:m]), strict=True):
                for space, word in words:
                    side += [(space, False), (word, True)]
    return _joined(sides[0]), _joined(sides[1])


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbours alike made one; a space between two that differ is marked with them."""
    joined: list[Piece] = []
    pieces = [piece for piece in pieces if piece[0]]
    for place, (piece, differs) in enumerate(pieces):
        if piece.isspace() and "\n" not in piece and 0 < place < len(pieces) - 1:
            differs = differs or (pieces[place - 1][1] and pieces[place + 1][1])
        if joined and joined[-1][1] == differs:
            joined[-1] = (joined[-1][0] + piece, differs)
        else:
            joined.append((piece, differs))
    return joined


# ---- showing it --------------------------------------------------------------------------------------


def show(pair: dict[str, Any], place: str, console: Console) -> None:
    """Print one pair; fits the console's width."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    ids = [str(pair.get(f"{side}_id") or side) for side in SIDES]
    margin = "" if pair.get("margin") is None else f", margin {pair['margin']:.3f}"
    title = Text.assemble(
        (f"{pair.get('kind') or 'pair'} {ids[0]} > {ids[1]}", "bold"), margin, f" ({place})"
    )
    console.print(title)
    if isinstance(pair.get("prompt"), str):
        console.print(Text(pair["prompt"]), style="italic")
    table = Table(box=SIMPLE_HEAD, pad_edge=False, expand=True)
    table.add_column("", width=8, style="dim")
    for side in SIDES:
        table.add_column(side, ratio=1, overflow="fold")
    plain = console.color_system is None
    pieces = differences(pair["chosen"], pair["rejected"])
    table.add_row(
        "", *(_marked(side, style, plain) for side, style in zip(pieces, ("green", "red"), strict=True))
    )
    table.add_section()
    for label, values in facts(pair):
        table.add_row(label, *values)
    console.print(table)


def _marked(pieces: list[Piece], style: str, plain: bool) -> Text:
    """A text with what the other lacks in colour, or in [ ] without colours; line ends stay outside."""
    from rich.text import Text

    text = Text()
    for piece, differs in pieces:
        if not differs:
            text.append(piece)
            continue
        for part in re.split(r"(\n+)", piece):
            if not part or part.startswith("\n"):
                text.append(part)
            else:
                text.append(f"[{part}]" if plain else part, "" if plain else f"bold reverse {style}")
    return text


def facts(pair: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Rewards, signals and lengths of both sides, as far as the file has them."""
    rewards = [pair.get(f"{side}_reward") for side in SIDES]
    if rewards != [None, None]:
        yield "reward", [_number(value) for value in rewards]
    signals = [pair.get(f"{side}_signals") or {} for side in SIDES]
    for name in SIGNALS:
        if any(one.get(name) is not None for one in signals):
            yield name, [_number(one.get(name)) for one in signals]
    chosen, rejected = (pair.get(f"{side}_tokens") for side in SIDES)
    if chosen is None or rejected is None:
        yield "length", [f"{len(pair[side]):,} characters" for side in SIDES]
    else:
        yield "tokens", [f"{chosen:,} ({chosen - rejected:+,})", f"{rejected:,}"]
    if pair.get("rejected_finish") == "length":
        yield "finish", ["", "cut off"]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
