"""`python -m stages changed FILE --out OUT`: changed questions (twins) of a file of questions with worked solutions.

A record holds `question`, and the worked solution that ends in `#### 18` as `answer` (GSM8K's name) or `solution` (this
pipeline's); without `id` its place in the file is its id. Says how many twins there are, and why other questions have
none.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from stages.regime_w.changed import REASONS, Change, ChangeCounts, changed_rows
from stages.run.errors import UserError
from stages.run.files import read_numbered_jsonl, write_jsonl
from stages.text.rows import Row, checked_row
from stages.tools.show import new_console, new_table


def main(file: Path, out: Path, change: Change, seed: int) -> None:
    """Write the twins of the questions in `file` to `out`, and print the counts.

    Raises UserError for a record that cannot be used, with file, line and what to do; `out` is then unchanged.
    """
    if out.exists() and file.exists() and out.samefile(file):
        raise UserError(f"--out {out}: is the file of questions itself; name another file")
    counts = ChangeCounts()
    write_jsonl(out, changed_rows(_rows(file), change, seed, counts))
    console = new_console()
    title = f"{counts.questions:,} questions, {counts.with_twin:,} with a twin, {counts.twins:,} twins"
    table = new_table("no twin", "reason", right=("no twin",), title=title)
    for reason, words in REASONS.items():
        if counts.refused[reason]:
            table.add_row(f"{counts.refused[reason]:,}", words)
    console.print(table if table.rows else title)
    console.print(f"twins: {out}")


def _rows(file: Path) -> Iterator[Row]:
    seen: set[str] = set()
    for place, (number, record) in enumerate(read_numbered_jsonl(file, {"question": str})):
        where = f"{file}:{number}"
        answer = record.get("solution", record.get("answer"))
        identity = str(record.get("id", f"{file.stem}-{place:05d}"))
        if identity in seen:
            raise UserError(f"{where}: the id '{identity}' is there twice; give each question its own")
        seen.add(identity)
        yield checked_row(identity, record["question"], answer, where)
    if not seen:
        raise UserError(f"{file}: no records in it, so there is nothing to change")
