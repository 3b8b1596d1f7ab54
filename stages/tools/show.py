"""How the tools find a record and show it: one console, one table, one way to write a value, JSON, "did you mean"."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
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


def shorten(text: str, length: int) -> str:
    """The text, cut to so many characters."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def indented(content: Any, by: int = 2) -> Any:
    """Something to print, moved to the right."""
    return Padding(content, (0, 0, 0, by), expand=False)


def print_json(value: Any) -> None:
    """Print data for programs; a dataclass as an object of its fields, a path as text."""

    def plain(one: Any) -> Any:
        return vars(one) if is_dataclass(one) else str(one)

    print(json.dumps(value, ensure_ascii=False, indent=2, default=plain))


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
