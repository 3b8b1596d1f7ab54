"""Reads and writes record files, JSON files and folders, so that a crash never leaves half of one.

A record file is UTF-8, one JSON object a line:

    {"id": "train-00017", "question": "Ann has 3 bags ...", "solution": "... #### 10"}

Outputs are written under a temporary name, fsynced and renamed: a reader sees the old file or the whole new one.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from stages.run.errors import UserError

FieldTypes = Mapping[str, type | tuple[type, ...]]

# Some programs write NaN and infinity, which JSON does not have; they are read as null.
_DECODER = json.JSONDecoder(parse_constant=lambda name: None)


def read_jsonl(path: Path, fields: FieldTypes | None = None) -> Iterator[dict[str, Any]]:
    """Yield the records of `path`, checking that each has `fields` of the given types.

    Blank lines are skipped. Raises UserError with file, line and field for anything else.
    """
    return (record for _, record in read_numbered_jsonl(path, fields))


def read_numbered_jsonl(path: Path, fields: FieldTypes | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """As `read_jsonl`, with each record's line number."""
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        try:
            record = _DECODER.decode(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, a number too long to read
            raise UserError(f"{path}:{number}: not a JSON object in UTF-8 ({error})") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: a JSON object is wanted, found {type(record).__name__}")
        for name, kind in (fields or {}).items():
            if name not in record:
                found = ", ".join(map(repr, record)) or "none"
                raise UserError(f"{path}:{number}: field '{name}' is missing; fields found: {found}")
            kinds = kind if isinstance(kind, tuple) else (kind,)
            value = record[name]
            # In Python a bool is an int; in a record it is not.
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                wanted = " or ".join(k.__name__ for k in kinds)
                raise UserError(
                    f"{path}:{number}: field '{name}' must be {wanted}, found "
                    f"{type(value).__name__} ({value!r:.60})"
                )
        yield number, record


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of `path`, each with its number. What begins as gzip does is unpacked on the way.

    Raises UserError when the file cannot be read to its end.
    """
    number = 0
    try:
        with path.open("rb") as file:
            packed = file.peek(2)[:2] == b"\x1f\x8b"
            for number, line in enumerate(gzip.GzipFile(fileobj=file) if packed else file, 1):
                yield number, line
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path}: damaged gzip after line {number} ({error}); compress it anew") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def jsonl_line(record: Mapping[str, Any]) -> str:
    """One record as a line: keys in the order given, floats in full, NaN refused (ValueError)."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[str]]:
    """A text file that replaces `path` only when the block ends without an error.

    Raises UserError when the folder cannot be written or the disk is full; the old file stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); the old file is unchanged") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync_files(folder: Path) -> None:
    """Make all files inside `folder` last through a power cut."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write all `records` to `path` at once."""
    with atomic_write(path) as file:
        file.writelines(map(jsonl_line, records))


def join_files(parts: Iterable[Path], path: Path) -> None:
    """Write the text of all `parts`, one after another, to `path` at once."""
    with atomic_write(path) as out:
        for part in parts:
            with part.open(encoding="utf-8") as file:
                shutil.copyfileobj(file, out)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, floats in full; NaN is refused (ValueError)."""
    with atomic_write(path) as file:
        json.dump(value, file, ensure_ascii=False, indent=2, allow_nan=False)
        file.write("\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises UserError when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); run `dvc repro` first") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged JSON ({error}); delete it and run `dvc repro`") from None


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A fresh folder that replaces `target` when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
        sync_files(fresh)
        if target.exists():
            shutil.rmtree(target)
        fresh.replace(target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
