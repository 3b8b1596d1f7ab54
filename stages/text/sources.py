"""Questions as they lie in their source: a file (JSONL, a JSON array, CSV, Parquet; also gzipped) or a hub's dataset.

    read_source("q.csv")  ->  ("q.csv:2", {"question": "Ann has 3 bags ...", "answer": "... #### 10"}), ...

What a file holds is seen from its beginning, not from its name; only CSV is known by its name.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from stages.run.errors import UserError
from stages.run.files import FieldTypes, numbered_lines, read_numbered_jsonl
from stages.run.params import Columns, HubDataset, HubTest
from stages.text.rows import FIELDS, Row, checked_row, entity

FORMATS = "JSONL (one JSON object a line), a JSON array, CSV or Parquet, in UTF-8; each also gzipped"
Record = dict[str, Any]


def read_rows(
    source: str | HubDataset,
    name: str,
    entities: list[str],
    columns: Columns | None = None,
    counts: Counter[str] | None = None,
) -> Iterator[Row]:
    """Yield the checked rows of a source. An id is `name` and the row's place, so it stays when other rows go.

    Notes the places of HTML entities. With `columns` it is a test set: a gold may be a bare number, and rows whose
    answer is `columns.skip` are left out and counted as `skipped`. Raises UserError as `read_source` and for a bad row.
    """
    wanted = columns or Columns()
    asked = [wanted.question] if isinstance(wanted.question, str) else wanted.question
    names = (" + ".join(asked), wanted.answer)
    for place, (where, record) in enumerate(
        read_source(source, (*asked, wanted.answer), columns is not None)
    ):
        parts, answer = [record[one] for one in asked], record[wanted.answer]
        if columns and isinstance(answer, int | float) and not isinstance(answer, bool):
            answer = str(answer)
        if columns and counts is not None and answer == columns.skip:
            counts["skipped"] += 1
            continue
        texts = all(isinstance(part, str) for part in parts)
        question = parts[0] if len(parts) == 1 else " ".join(parts) if texts else parts
        row = checked_row(f"{name}-{place:05d}", question, answer, where, names, bare=columns is not None)
        if found := entity(row):
            entities.append(f"{where} ({found})")
        yield row


def read_source(
    source: str | HubDataset, columns: Sequence[str] = FIELDS, numbers: bool = False
) -> Iterator[tuple[str, Record]]:
    """Yield where each record stands (`file:line`, or a row counted from 1) and the record with its `columns`.

    With `numbers` the last column may hold a number instead of text.

    Only a JSON array, and Parquet that is gzipped, are held in memory as a whole. Raises UserError for a source that
    cannot be read, naming file and line or row, and for a missing field.
    """
    if isinstance(source, HubDataset):
        return _from_hub(source, columns)
    path = Path(source)
    if path.name.lower().removesuffix(".gz").endswith(".csv"):
        return _from_csv(path, columns)
    texts = ((number, line.removeprefix(b"\xef\xbb\xbf").strip()) for number, line in numbered_lines(path))
    first, start = next((text for text in texts if text[1]), (1, b"{}"))
    if start.startswith(b"PAR1"):
        return _from_parquet(path, columns)
    if start.startswith(b"["):
        return _from_array(path, columns)
    if start.startswith(b"{") and start.endswith(b"}"):
        types: FieldTypes = dict.fromkeys(columns, str) | (
            {columns[-1]: (str, int, float)} if numbers else {}
        )
        records = read_numbered_jsonl(path, types)
        return ((f"{path}:{number}", record) for number, record in records)
    found = "an object over several lines" if start.startswith(b"{") else f"{start[:20]!r}"
    raise UserError(f"{path}:{first}: begins with {found}; wanted is {FORMATS}")


def _from_csv(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, Record]]:
    lines = (_text(path, number, line) for number, line in numbered_lines(path))
    reader = csv.reader(lines, strict=True)
    header: list[str] = []
    first = 1  # line of a record that may reach over several
    try:
        for cells in reader:
            where, first = f"{path}:{first}", reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = cells
                _check_columns(
                    where, columns, header, "; CSV wants them in its first line, with commas between"
                )
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{where}: {len(cells)} cells, where the first line names {len(header)} columns; put a text with "
                    "commas or line breaks in double quotes"
                )
            yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{first}: not valid CSV ({error}); check the double quotes") from None


def _from_array(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, Record]]:
    text = _text(path, 1, b"".join(line for _, line in numbered_lines(path)))
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # a number too long to read, brackets too deep
        raise UserError(f"{path}: not valid JSON ({error})") from None
    for place, record in enumerate(records, 1):
        where = f"{path} row {place}"
        if not isinstance(record, dict):
            raise UserError(f"{where}: a JSON object is wanted, found {type(record).__name__}")
        _check_columns(where, columns, record)
        yield where, record


def _from_parquet(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, Record]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        data = b"".join(line for _, line in numbered_lines(path)) if packed else b""
        table = parquet.ParquetFile(pyarrow.BufferReader(data) if packed else path)
        _check_columns(str(path), columns, table.schema_arrow.names)
        place = 0
        for batch in table.iter_batches(columns=list(columns)):
            for record in batch.to_pylist():
                place += 1
                yield f"{path} row {place}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not valid Parquet ({error})") from None


def _text(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number += line.count(b"\n", 0, error.start)
        raise UserError(f"{path}:{number}: not UTF-8 ({error.reason}); save the file as UTF-8") from None


def _check_columns(where: str, columns: Sequence[str], found: Iterable[str], advice: str = "") -> None:
    names = list(found)
    for name in columns:
        if names.count(name) != 1:
            how = "is missing" if name not in names else "is there twice"
            shown = ", ".join(map(repr, names)) or "none"
            raise UserError(f"{where}: field '{name}' {how}; fields found: {shown}{advice}")


def _from_hub(source: HubDataset, columns: Sequence[str]) -> Iterator[tuple[str, Record]]:
    import datasets

    name = f"{source.id} ({source.config}, {source.split})"
    try:
        table = datasets.load_dataset(source.id, source.config, split=source.split, revision=source.revision)
    except Exception as error:  # datasets, the hub's client and the network raise errors of many classes
        reason = " ".join(str(error).split())
        key, instead = ("data.*", "data.source: files")
        if isinstance(source, HubTest):
            key, instead = ("data.tests.*", "source: file")
        raise UserError(
            f"{name}: cannot be loaded at revision {source.revision[:12]} "
            f"({type(error).__name__}: {reason:.300}); "
            f"check the network and {key}.{{id,config,split,revision}}, or use {instead}"
        ) from error
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise UserError(
            f"{name}: has no column '{missing[0]}'; columns found: {', '.join(table.column_names)}"
        )
    for place, record in enumerate(table):
        yield f"{name} row {place}", record
