"""JSONL records and durable files.

A record file is UTF-8, one JSON object a line:

    {"id": "train-00017", "question": "Ann has 3 bags ...", "answer": "... #### 10"}

Outputs are written under a temporary name, fsynced and renamed, so a reader sees the old file or the
whole new one. Progress of long stages goes to a `Journal`: append-only, one writer, a checksum a line.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Self

from stages.core.errors import UserError

Fields = Mapping[str, type | tuple[type, ...]]


def read_jsonl(path: Path, fields: Fields | None = None) -> Iterator[dict[str, Any]]:
    """Yield the records of `path`, checking that each has `fields` of the given types.

    Blank lines are skipped. Raises UserError with file, line and field for anything else.
    """
    return (record for _, record in read_numbered_jsonl(path, fields))


def read_numbered_jsonl(path: Path, fields: Fields | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """As `read_jsonl`, with each record's line number."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    with file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
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
        if error.filename is None and error.errno is None:
            raise
        raise UserError(f"{path}: cannot be written ({error.strerror}); the old file is unchanged") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_jsonl(path: Path, records: Iterator[Mapping[str, Any]] | list[dict[str, Any]]) -> int:
    """Write all `records` to `path` at once; returns how many."""
    count = 0
    with atomic_write(path) as file:
        for record in records:
            file.write(jsonl_line(record))
            count += 1
    return count


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


class Journal:
    """Progress of one long stage: records that survive a kill at any moment.

    Each line is `{"sum": "<crc32 of the body>", "record": <body>}`. Opening takes an exclusive lock
    (one writer), drops a torn last line, and moves damaged lines to `<name>.damaged`, so that what
    they held is done again. `records` then holds what is whole, by its `key` (the first one wins).
    Used in a `with` block, it is closed however the block ends. Raises UserError when it cannot be written.
    """

    def __init__(self, path: Path, key: str = "id") -> None:
        self.path = path
        self.key = key
        self.records: dict[str, dict[str, Any]] = {}
        self.damaged = 0
        with self._writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = path.with_name(path.name + ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UserError(f"{path}: another run is writing it; wait for it, or end it") from None
        with self._writing():
            self._recover()
            self._file = path.open("ab")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _recover(self) -> None:
        if not self.path.exists():
            return
        repaired = self.path.with_name(self.path.name + ".repaired")
        aside = self.path.with_name(self.path.name + ".damaged")
        torn = False
        with self.path.open("rb") as lines, repaired.open("wb") as whole:
            for line in lines:
                record = self._parse(line)
                if record is not None and line.endswith(b"\n"):
                    self.records.setdefault(record[self.key], record)
                    whole.write(line)
                elif line.endswith(b"\n") or b"\0" in line:  # zeros are what a power cut leaves, a kill never
                    self.damaged += 1
                    with aside.open("ab") as file:
                        file.write(line.removesuffix(b"\n") + b"\n")
                        file.flush()
                        os.fsync(file.fileno())
                else:
                    torn = True
            whole.flush()
            os.fsync(whole.fileno())
        if self.damaged or torn:
            repaired.replace(self.path)
            sync_folder(self.path.parent)
        else:
            repaired.unlink()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); free some room or check its owner, "
                "and run the same command again: it goes on where it was"
            ) from error

    def _parse(self, line: bytes) -> dict[str, Any] | None:
        try:
            envelope = json.loads(line.decode())
            body = json.dumps(envelope["record"], ensure_ascii=False)
            whole = envelope["sum"] == f"{zlib.crc32(body.encode()):08x}" and self.key in envelope["record"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        return envelope["record"] if whole else None

    def add(self, record: dict[str, Any]) -> None:
        """Append one record; it is on its way to the disk, `flush` makes it stay."""
        body = json.dumps(record, ensure_ascii=False)
        with self._writing():
            self._file.write(f'{{"sum": "{zlib.crc32(body.encode()):08x}", "record": {body}}}\n'.encode())
        self.records[record[self.key]] = record

    def flush(self) -> None:
        """Make everything added so far last through a power cut."""
        with self._writing():
            self._file.flush()
            os.fsync(self._file.fileno())

    def clear(self) -> None:
        """Forget all records, once they are kept elsewhere."""
        with self._writing():
            self._file.flush()
            self._file.truncate(0)
        self.records.clear()

    def close(self) -> None:
        """Flush and let the lock go."""
        try:
            self.flush()
        finally:
            try:
                with self._writing():
                    self._file.close()
            finally:
                self._lock.close()
