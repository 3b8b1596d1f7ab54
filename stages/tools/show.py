"""How the tools find a record and show it: console, table, values, JSON, "and N more", "did you mean"."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import is_dataclass
from difflib import SequenceMatcher
from heapq import nlargest
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from stages.run.errors import UserError
from stages.run.files import FieldTypes, read_jsonl

Row = dict[str, Any]
EXAMPLE = "Ann has 3 bags of 4 apples and eats 2. How many apples are left?"


def new_console(**options: Any) -> Console:
    """A console that prints strings as they are: brackets are no markup, and numbers get no colour."""
    return Console(markup=False, emoji=False, highlight=False, **options)


def new_table(*columns: str, right: Collection[str] = (), **options: Any) -> Table:
    """A table with these columns, those in `right` aligned right; long cells are folded."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title_justify="left", title_style="bold", **options)
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return table


def cell(value: Any, spec: str = "") -> str:
    """A value as text; numbers by the format `spec`, without one in four digits; – when absent."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and spec:
        return format(value, spec)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def verdict(answer: Any, correct: Any) -> Text:
    """An answer with its mark: ✓ in green, ✗ in red, none when nobody judged it."""
    words = "none" if answer is None else str(answer)
    if correct is None:
        return Text(words)
    return Text(f"{words} ✓", "green") if correct else Text(f"{words} ✗", "red")


def at_most(count: int, items: Sequence[str]) -> list[str]:
    """The first items, and where there are more, how many."""
    rest = len(items) - count
    return [*items[:count], *([f"and {rest:,} more"] if rest > 0 else [])]


def raise_first(problems: Sequence[str]) -> None:
    """Raise the first of the problems that a tool has printed, if there is one."""
    if problems:
        more = f" (and {len(problems) - 1} more above)" if problems[1:] else ""
        raise UserError(problems[0] + more)


def printable(text: str) -> str:
    """The text as it can be written in UTF-8: half a surrogate pair as its escape."""
    return text.encode(errors="backslashreplace").decode()


def first_line(error: BaseException) -> str:
    """The first line of a library's error, or its class if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def indented(content: Any, by: int = 2) -> Any:
    """Something to print, moved to the right."""
    return Padding(content, (0, 0, 0, by), expand=False)


def print_json(value: Any) -> None:
    """Print data for programs; a dataclass as an object of its fields, a path as text."""

    def plain(one: Any) -> Any:
        return vars(one) if is_dataclass(one) else str(one)

    print(printable(json.dumps(value, ensure_ascii=False, indent=2, default=plain)))


def nearest(name: str, known: Iterable[str]) -> str:
    """'; the nearest ids are …' to end a message about an unknown id with; nothing when no id is known."""

    def likeness(one: str) -> tuple[bool, float]:
        return one.endswith(name), SequenceMatcher(None, one, name).ratio()

    found = nlargest(3, known, likeness)
    return f"; the nearest ids are {', '.join(found)}" if found else ""


def find_record(path: Path, name: str, fields: FieldTypes, kind: str) -> Row:
    """The record with this id. Raises UserError, with the nearest ids, when the file has none."""
    ids = []
    for record in read_jsonl(path, fields):
        if record["id"] == name:
            return record
        ids.append(record["id"])
    raise UserError(f"{path}: no {kind} '{name}'" + nearest(name, ids))
