"""The journal of a long stage: an append-only file of finished records, with a checksum on every line."""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from stages.run.errors import UserError
from stages.run.files import sync_folder


class Journal:
    """Progress of one long stage: records that survive a kill at any moment.

    Each line is `{"sum": "<crc32 of the body>", "record": <body>}`. Opening drops a torn last line and moves damaged
    lines to `<name>.damaged`, so that what they held is done again. `records` then holds the whole ones by id (the
    first one wins). Used in a `with` block, it is closed however the block ends. The lock of the stage (stage.py)
    sees to it that there is one writer. Raises UserError when the journal cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        self.damaged = 0
        with self._writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._recover()
            self._file = path.open("ab")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.flush()
        finally:
            with self._writing():
                self._file.close()

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
                    self.records.setdefault(record["id"], record)
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
            whole = envelope["sum"] == f"{zlib.crc32(body.encode()):08x}" and "id" in envelope["record"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        return envelope["record"] if whole else None

    def add(self, record: dict[str, Any]) -> None:
        """Append one record; it is on its way to the disk, `flush` makes it stay."""
        body = json.dumps(record, ensure_ascii=False)
        with self._writing():
            self._file.write(f'{{"sum": "{zlib.crc32(body.encode()):08x}", "record": {body}}}\n'.encode())
        self.records[record["id"]] = record

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
