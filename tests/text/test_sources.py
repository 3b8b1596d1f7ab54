"""A source is read in every format that is named, row by row, and what is none of them is one line that names them."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from stages.run.errors import UserError
from stages.text.sources import FORMATS, read_source

ROWS = [
    {
        "question": 'Ann has 3 bags, "each" of 4 apples.\nHow many?',
        "answer": "3*4 = 12\n#### 12",
        "extra": "a",
    },
    {"question": "दुकान में 5 सेब हैं?", "answer": "#### 5", "extra": ""},
]


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_array(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps(rows, indent=2, ensure_ascii=False).encode("utf-8-sig")


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8-sig")


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


KINDS = {
    "q.jsonl": (as_jsonl, ["q.jsonl:1", "q.jsonl:2"]),
    "q.json": (as_array, ["q.json row 1", "q.json row 2"]),
    "q.csv": (as_csv, ["q.csv:2", "q.csv:5"]),
    "q.parquet": (as_parquet, ["q.parquet row 1", "q.parquet row 2"]),
}


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_every_format_gives_the_same_rows(name: str, packed: bool) -> None:
    """Also gzipped, and then also without `.gz` in the name. The place of each row is told as the format can."""
    kind: tuple[Callable[[list[dict[str, Any]]], bytes], list[str]] = KINDS[name]
    data = kind[0](ROWS)
    for file in (name, f"{name}.gz") if packed else (name,):
        Path(file).write_bytes(gzip.compress(data) if packed else data)
        read = list(read_source(file))
        assert [where.replace(".gz", "") for where, _ in read] == kind[1]
        assert [(row["question"], row["answer"]) for _, row in read] == [
            (row["question"], row["answer"]) for row in ROWS
        ]


def test_jsonl_is_read_line_by_line() -> None:
    """A mistake is met where it stands, after the rows before it."""
    Path("q.jsonl").write_bytes(b"\n" + as_jsonl(ROWS) + b"broken\n")
    rows = read_source("q.jsonl")
    assert [next(rows)[0], next(rows)[0]] == ["q.jsonl:2", "q.jsonl:3"]
    with pytest.raises(UserError, match=r"^q\.jsonl:4: not a JSON object in UTF-8"):
        next(rows)


def test_an_empty_file_has_no_rows() -> None:
    for name in ("q.jsonl", "q.csv"):
        Path(name).write_bytes(b"")
        assert list(read_source(name)) == []


REFUSED = [
    ("q.xlsx", b"PK\x03\x04rest", f"q.xlsx:1: begins with b'PK\\x03\\x04rest'; wanted is {FORMATS}"),
    ("q.jsonl.bz2", bz2.compress(b"{}"), "q.jsonl.bz2:1: begins with b'BZh9"),
    ("q.txt", b"\nquestion,answer\n", f"q.txt:2: begins with b'question,answer'; wanted is {FORMATS}"),
    (
        "q.json",
        b'{\n "data": []\n}',
        f"q.json:1: begins with an object over several lines; wanted is {FORMATS}",
    ),
    (
        "q.jsonl",
        as_jsonl(ROWS)[:80],
        f"q.jsonl:1: begins with an object over several lines; wanted is {FORMATS}",
    ),
    ("q.jsonl", b'{"question": "Why?"}', "q.jsonl:1: field 'answer' is missing; fields found: 'question'"),
    ("q.json", b'[{"question": "a",\n "answer": }]', "q.json:2: not valid JSON (Expecting value)"),
    ("q.json", b'[\n"ab\xff"]', "q.json:2: not UTF-8 (invalid start byte); save the file as UTF-8"),
    ("q.json", b'[{"question": "a", "answer": "b"}, 5]', "q.json row 2: a JSON object is wanted, found int"),
    ("q.json", b'[{"question": "a"}]', "q.json row 1: field 'answer' is missing; fields found: 'question'"),
    ("q.json", b"[" * 99999, "q.json: not valid JSON ("),
    (
        "q.csv",
        b"question;answer\na;b\n",
        "q.csv:1: field 'question' is missing; fields found: 'question;answer'; CSV",
    ),
    (
        "q.csv",
        b"question,answer,answer\n",
        "q.csv:1: field 'answer' is there twice; fields found: 'question', ",
    ),
    (
        "q.csv",
        b'question,answer\n\n"a\nb",c\nd,e,f\n',
        "q.csv:5: 3 cells, where the first line names 2 columns; put a text with commas or ",
    ),
    (
        "q.csv",
        b'question,answer\na,b\n"c,d\n',
        "q.csv:3: not valid CSV (unexpected end of data); check the double",
    ),
    (
        "q.csv",
        b"question,answer\na,\xff\n",
        "q.csv:2: not UTF-8 (invalid start byte); save the file as UTF-8",
    ),
    ("q.parquet", b"PAR1 cut off", "q.parquet: not valid Parquet ("),
    (
        "q.parquet",
        as_parquet([{"problem": "a"}]),
        "q.parquet: field 'question' is missing; fields found: 'problem'",
    ),
    ("q.csv.gz", gzip.compress(as_csv(ROWS))[:-9], "q.csv.gz: damaged gzip after line "),
]


@pytest.mark.parametrize(("name", "data", "message"), REFUSED)
def test_what_cannot_be_read_is_one_line(name: str, data: bytes, message: str) -> None:
    Path(name).write_bytes(data)
    with pytest.raises(UserError) as caught:
        list(read_source(name))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
