"""What all tools share to show records."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from stages.run.errors import UserError
from stages.run.files import write_jsonl
from stages.tools import show


def test_cells() -> None:
    values = (None, True, 3, 0.123456, 12345.678, [1])
    assert list(map(show.cell, values)) == ["–", "yes", "3", "0.1235", "1.235e+04", "[1]"]
    cells = [show.cell(0.5, ".3f"), show.cell(1200, ","), show.cell("high", ".3f"), show.cell(None, ".1%")]
    assert cells == ["0.500", "1,200", "high", "–"]
    answers = (("5", True), ("5", False), (None, False), ("5", None))
    assert [show.verdict(*one).plain for one in answers] == ["5 ✓", "5 ✗", "none ✗", "5"]
    assert show.at_most(2, ["a", "b"]) == ["a", "b"]
    assert show.at_most(2, [*"abcd"]) == ["a", "b", "and 2 more"]


def test_strings_are_printed_as_they_are() -> None:
    """A text may hold what looks like markup, even such as would be an error itself."""
    stream = io.StringIO()
    table = show.new_table("[bold]name", "size", right=("size",))
    table.add_row("[/] :smile: x[0]", "7")
    console = show.new_console(file=stream, width=60)
    console.print(table)
    console.print("[/] in [bold]x[0]")
    lines = [line.strip() for line in stream.getvalue().splitlines()]
    assert lines[1].split() == ["[bold]name", "size"] and lines[3] == "[/] :smile: x[0]      7"
    assert lines[-1] == "[/] in [bold]x[0]"


def test_an_unknown_id_names_the_nearest(tmp_path: Path) -> None:
    """First those that end alike, as a number typed without its prefix does."""
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"id": name} for name in ("171", "train-00017", "ann", "train-00170")])
    assert show.find_record(path, "ann", {"id": str}, "question") == {"id": "ann"}
    with pytest.raises(UserError) as error:
        show.find_record(path, "17", {"id": str}, "question")
    assert str(error.value).startswith(f"{path}: no question '17'; the nearest ids are train-00017, ")
    path.write_text("")
    with pytest.raises(UserError, match=r"no question '17'$"):
        show.find_record(path, "17", {"id": str}, "question")
