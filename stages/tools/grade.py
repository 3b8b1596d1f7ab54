"""`python -m stages grade FILE...`: grades a log of completions from anywhere, as the pipeline grades its own.

    python -m stages grade samples.jsonl --completion resps --gold doc.answer --id doc_id --out graded.jsonl

Several files are the parts of one log. It is read, graded and written in pieces, on all cores when there is
more than one piece, so that its size does not matter. A graded record is the original one with `id`,
`question`, `gold`, `completion` and the verdict as in data/platinum_eval/*.jsonl; a value that this replaces
is kept under `original`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from stages.core.answers import gold_answer, read_answer, same_answer
from stages.core.errors import UserError
from stages.core.records import atomic_write, jsonl_line
from stages.core.stats import Summary, health_warnings
from stages.tools.fields import question_id, require

if TYPE_CHECKING:
    from rich.console import Console

PIECE = 4_000_000  # bytes of a log that are graded together
SEED = 0  # of the bootstraps
_CANONICAL = re.compile(r"0|-?[1-9][0-9]{0,14}")  # golds that need no reading, for speed
# NaN and infinity are no JSON, though some programs write them; in a graded log they become null.
_DECODER = json.JSONDecoder(parse_constant=lambda name: None)


@dataclass(frozen=True)
class Fields:
    """Where the parts of a record are; `question` and `id` are optional unless they are named."""

    completion: str = "completion"
    gold: str = "gold"
    question: str | None = None
    id: str | None = None


@dataclass(frozen=True)
class Piece:
    """Some lines of one file, and how to grade them."""

    file: str
    first_line: int
    lines: list[bytes]
    fields: Fields
    skip_bad: bool
    keep: bool


@dataclass
class Graded:
    """What came of a piece: the graded lines (when they are kept), the counts, and the bad lines."""

    text: str = ""
    summary: Summary = field(default_factory=Summary)
    bad: int = 0
    first_bad: str = ""


def main(
    files: Sequence[str],
    fields: Fields,
    out: Path | None = None,
    skip_bad: bool = False,
    as_json: bool = False,
    console: Console | None = None,
) -> None:
    """Grade the log, print its metrics, and write the graded log to `out` when it is given.

    `-` among `files` is the standard input. Raises UserError for a bad line (file, line, what to do), unless
    `skip_bad`; then bad lines are counted and left out.
    """
    from rich.console import Console

    console = console or Console()
    _check_out(files, out)
    total = Graded()
    with (
        contextlib.ExitStack() as stack,
        _progress(files) as advance,
    ):
        file: IO[str] | None = stack.enter_context(atomic_write(out)) if out else None
        for made in _graded(_pieces(files, fields, skip_bad, out is not None, advance)):
            total.summary.update(made.summary)
            total.bad += made.bad
            total.first_bad = total.first_bad or made.first_bad
            if file:
                file.write(made.text)
        if not total.summary.counts["questions"]:
            what = f"all {total.bad:,} lines are bad: {total.first_bad}" if total.bad else "no records in it"
            raise UserError(f"{', '.join(files)}: nothing to grade, {what}")
        metrics = total.summary.metrics(SEED)
    name = Path(files[0]).name if len(files) == 1 else f"{len(files)} files"
    warnings = health_warnings(metrics, "standard input" if name == "-" else name)
    if as_json:
        print(
            json.dumps(
                {"files": list(files), "bad_lines": total.bad, **metrics, "warnings": warnings}, indent=2
            )
        )
    else:
        _print(console, metrics, total, warnings, out)


def grade(record: dict[str, Any], fields: Fields) -> dict[str, Any]:
    """The verdict on one record, and what it rests on: the keys of a row of data/platinum_eval.

    `id`, `question`, `samples`, `tokens` and `finish` are there only when the record has them. Raises
    ValueError when the completion or the gold is missing or cannot be read.
    """
    completion = _single(require(record, fields.completion, "--completion"))
    if not isinstance(completion, str):
        raise ValueError(_not_one_text(completion, fields.completion))
    gold = _gold(record, fields.gold)
    question = _question(record, fields.question)
    row: dict[str, Any] = {}
    if fields.id is not None:
        row["id"] = question_id(require(record, fields.id, "--id"), fields.id)
    elif "id" in record:
        row["id"] = record["id"]
    if question is not None:
        row["question"] = question
    reading = read_answer(completion, question)
    row |= {
        "gold": gold,
        "completion": completion,
        "answer": reading.answer,
        "correct": same_answer(reading.answer, gold),
        "flexible_answer": reading.flexible_answer,
        "flexible_correct": same_answer(reading.flexible_answer, gold),
        "leak": reading.leak,
        "answers_found": reading.found,
    }
    if type(record.get("tokens")) is int:
        row["tokens"] = record["tokens"]
    if isinstance(record.get("finish"), str):
        row["finish"] = record["finish"]
    samples = record.get("samples")
    if isinstance(samples, list) and samples and all(_is_sample(sample) for sample in samples):
        answers = [read_answer(sample["completion"], question).answer for sample in samples]
        row["samples"] = [
            {**sample, "answer": answer, "correct": same_answer(answer, gold)}
            for sample, answer in zip(samples, answers, strict=True)
        ]
    return row


def _single(value: Any) -> Any:
    """What lists of one thing hold: `[["text"]]` is "text", as lm-evaluation-harness writes it."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value


def _not_one_text(value: Any, path: str) -> str:
    if isinstance(value, list):
        return f"field '{path}' holds {len(value)} values; name one of them, as {path}.0"
    if isinstance(value, dict):
        return f"field '{path}' is an object; name one of its fields, as {path}.{next(iter(value), 'text')}"
    return f"field '{path}' must be text, found {value!r:.60}"


def _gold(record: dict[str, Any], path: str) -> str:
    """The canonical gold from a number, a plain answer, or worked text that ends in one."""
    value = _single(require(record, path, "--gold"))
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(_not_one_text(value, path).replace("must be text", "must be text or a number"))
    text = value if isinstance(value, str) else str(value)
    gold = text if _CANONICAL.fullmatch(text) else gold_answer(text)
    if gold is None:
        raise ValueError(f"field '{path}' holds no number that could be the answer: {value!r:.60}")
    return gold


def _question(record: dict[str, Any], path: str | None) -> str | None:
    if path is None:
        value = _single(record.get("question"))
        return value if isinstance(value, str) else None
    value = _single(require(record, path, "--question"))
    if not isinstance(value, str):
        raise ValueError(_not_one_text(value, path))
    return value


def _is_sample(sample: Any) -> bool:
    return isinstance(sample, dict) and isinstance(sample.get("completion"), str)


def _merged(record: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """The record with the row's values; those they replace are kept under `original`."""
    replaced = {key: record[key] for key, value in row.items() if key in record and record[key] != value}
    if not replaced:
        return {**record, **row}
    before = record.get("original")
    return {**record, **row, "original": {**replaced, **before} if isinstance(before, dict) else replaced}


def grade_piece(piece: Piece) -> Graded:
    """Grade some lines. Raises UserError for the first bad one, unless the piece says to skip them."""
    made = Graded()
    kept: list[str] = []
    for number, line in enumerate(piece.lines, piece.first_line):
        if line.isspace():
            continue
        try:
            record = _record(line)
            row = grade(record, piece.fields)
            if piece.keep:
                kept.append(jsonl_line(_merged(record, row)))
        except (ValueError, RecursionError) as error:
            reason = f"{piece.file}:{number}: {error}"
            if not piece.skip_bad:
                raise UserError(f"{reason} (--skip-bad leaves bad lines out)") from None
            made.bad += 1
            made.first_bad = made.first_bad or reason
            continue
        made.summary.add(row)
    # Half a surrogate pair is no text; written as its JSON escape, it stays what it was.
    made.text = "".join(kept).encode(errors="backslashreplace").decode()
    return made


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = _DECODER.decode(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a JSON object in UTF-8 ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is wanted, found {type(record).__name__}")
    return record


def _pieces(
    files: Sequence[str], fields: Fields, skip_bad: bool, keep: bool, advance: Callable[[int], None]
) -> Iterator[Piece]:
    for name in files:
        shown, line = ("standard input" if name == "-" else name), 1
        with _open(name) as file:
            while lines := file.readlines(PIECE):
                yield Piece(shown, line, lines, fields, skip_bad, keep)
                line += len(lines)
                advance(sum(map(len, lines)))


def _open(name: str) -> IO[bytes]:
    if name == "-":
        return sys.stdin.buffer
    try:
        return Path(name).open("rb")
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror}); check the path") from None


def _graded(pieces: Iterator[Piece]) -> Iterator[Graded]:
    """The graded pieces in order: by this process when there is one piece or one core, else by all cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    first = list(islice(pieces, 2))
    if cores == 1 or len(first) < 2:
        yield from map(grade_piece, chain(first, pieces))
        return
    pool = ProcessPoolExecutor(cores, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    try:
        waiting: deque[Future[Graded]] = deque()
        for piece in chain(first, pieces):
            waiting.append(pool.submit(grade_piece, piece))
            if len(waiting) > 2 * cores:  # no more than this is in memory at a time
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError("grade: a process was ended from outside, likely for want of memory") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _check_out(files: Sequence[str], out: Path | None) -> None:
    if files.count("-") > 1:
        raise UserError("grade: the standard input (-) can be read once only")
    for name in files:
        if out and name != "-" and out.exists() and Path(name).exists() and out.samefile(name):
            raise UserError(f"--out {out}: is the log itself; name another file")


@contextlib.contextmanager
def _progress(files: Sequence[str]) -> Iterator[Callable[[int], None]]:
    """A bar of the bytes read, on a terminal only; yields `advance(bytes)`."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    sizes = [Path(name).stat().st_size for name in files if Path(name).is_file()]
    columns = (TextColumn("grading"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=sum(sizes) if len(sizes) == len(files) else None)
        yield lambda size: bar.advance(task, size)


def _print(
    console: Console, metrics: dict[str, float | int], total: Graded, warnings: list[str], out: Path | None
) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    title = f"{metrics['questions']:,} completions graded"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, value in metrics.items():
        if name == "questions" or name.endswith(("_low", "_high")):
            continue
        if name.startswith("tokens"):
            table.add_row(name, f"{value:,.1f}")
        elif f"{name}_low" in metrics:
            interval = f"{100 * metrics[f'{name}_low']:.1f}–{100 * metrics[f'{name}_high']:.1f}"
            table.add_row(name, f"{100 * value:.1f} %", interval)
        else:
            table.add_row(name, f"{100 * value:.1f} %")
    console.print(table)
    if total.bad:
        console.print(
            f"bad lines left out: {total.bad:,}, the first: {total.first_bad}", markup=False, highlight=False
        )
    for warning in warnings:
        console.print(f"[bold red]WARNING[/bold red] {escape(warning)}", highlight=False)
    words = (
        f"graded log: {out}" if out else "The graded log was not kept; --out FILE writes it, for `compare`."
    )
    console.print(words, markup=False, highlight=False)
