"""`python -m stages grade FILE...`: grades a log of completions from anywhere, as the pipeline grades its own.

Several files are the parts of one log. A graded record is the original one with `id`, `question`, `gold`,
`completion` and the verdict as in data/platinum_eval/*.jsonl; a value that this replaces is kept under `original`.
"""

from __future__ import annotations

import contextlib
import fileinput
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from stages.regime_w.record import count
from stages.run.errors import UserError
from stages.run.files import atomic_write, jsonl_line
from stages.stats.one import BOOTSTRAP_SEED, Summary, health_warnings
from stages.text.answers import gold_answer
from stages.text.verdict import sample_verdict, verdict
from stages.tools.fields import question_id, require
from stages.tools.log_votes import LogVotes, print_votes
from stages.tools.show import new_console, new_table, print_json, printable

# Some programs write NaN and infinity, which JSON does not have; the graded log says null.
_DECODER = json.JSONDecoder(parse_constant=lambda name: None)


@dataclass(frozen=True)
class FieldNames:
    """Where a record holds its parts; a record may lack `question` and `id` unless the user named their fields."""

    completion: str = "completion"
    gold: str = "gold"
    question: str | None = None
    id: str | None = None
    samples: str | None = None


def main(
    files: Sequence[str],
    fields: FieldNames,
    out: Path | None = None,
    skip_bad: bool = False,
    as_json: bool = False,
    vote: str | None = None,
) -> None:
    """Grade the log, print its metrics, and write the graded log to `out` when it is given.

    `vote` names the signal by which the samples of each question vote (stages/regime_w/voting.py).
    `-` among `files` is the standard input. Raises UserError for a bad line (file, line, what to do), unless
    `skip_bad`: then bad lines are counted and left out.
    """
    for name in files:
        if out and name != "-" and out.exists() and Path(name).exists() and out.samefile(name):
            raise UserError(f"--out {out}: is the log itself; name another file")
    summary, bad, first_bad = Summary(), 0, ""
    votes = LogVotes(vote) if vote else None
    with contextlib.ExitStack() as stack:
        graded: IO[str] | None = stack.enter_context(atomic_write(out)) if out else None
        for place, line in _lines(files):
            try:
                record = _parse(line)
                row = grade(record, fields)
                if votes:
                    votes.add(row)
                if graded:
                    graded.write(printable(jsonl_line(_merge(record, row))))
            except (ValueError, RecursionError) as error:
                if not skip_bad:
                    raise UserError(f"{place}: {error} (--skip-bad leaves bad lines out)") from None
                bad, first_bad = bad + 1, first_bad or f"{place}: {error}"
            else:
                summary.add(row)
        if not summary.counts["questions"]:
            what = f"all {bad:,} lines are bad: {first_bad}" if bad else "no records in it"
            raise UserError(f"{', '.join(files)}: nothing to grade, {what}")
    metrics = summary.metrics(BOOTSTRAP_SEED)
    voted = votes.metrics() if votes else None
    name = Path(files[0]).name if len(files) == 1 else f"{len(files)} files"
    warnings = health_warnings(metrics, "standard input" if name == "-" else name)
    if as_json:
        more = {"votes": voted} if voted else {}
        print_json({"files": list(files), "bad_lines": bad, **metrics, "warnings": warnings, **more})
        return
    console = new_console()
    _print_table(console, metrics)
    if voted:
        print_votes(console, voted)
    if bad:
        console.print(f"bad lines left out: {bad:,}, the first: {first_bad}")
    for warning in warnings:
        console.print(f"WARNING {warning}", style="bold red")
    not_kept = "The graded log was not kept; --out FILE writes it, for `compare`."
    console.print(f"graded log: {out}" if out else not_kept)


def grade(record: dict[str, Any], fields: FieldNames) -> dict[str, Any]:
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
        row["id"] = require(record, fields.id, "--id")
        question_id(row["id"], fields.id)  # it can be paired
    elif "id" in record:
        row["id"] = record["id"]
    if question is not None:
        row["question"] = question
    finish = record.get("finish")
    row["gold"] = gold
    row |= verdict(
        completion,
        gold,
        question,
        _tokens(record.get("tokens")),
        finish if isinstance(finish, str) else None,
    )
    if samples := _samples(record, fields.samples):
        row["samples"] = [
            {**sample, **sample_verdict(sample["completion"], gold, question)} for sample in samples
        ]
    return row


# ---- Fields of a record ------------------------------------------------------------------------------


def _single(value: Any) -> Any:
    """The one thing in a list of one thing: `[["text"]]` is "text", as lm-evaluation-harness writes it."""
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
    gold = gold_answer(str(value))
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


def _tokens(value: Any) -> int | None:
    """How many tokens; None where that cannot be seen, as the field may be about something else."""
    try:
        return count(value)
    except ValueError:
        return None


def _is_sample(sample: Any) -> bool:
    return isinstance(sample, dict) and isinstance(sample.get("completion"), str)


def _samples(record: dict[str, Any], path: str | None) -> list[dict[str, Any]]:
    """The samples as objects with `completion`; a plain text is one, too. None at all unless each can be read."""
    value = record.get("samples") if path is None else _single(require(record, path, "--samples"))
    found = value if isinstance(value, list) else [value]
    samples: list[Any] = [{"completion": one} if isinstance(one, str) else one for one in found]
    if all(map(_is_sample, samples)):
        return samples
    if path is None:
        return []
    raise ValueError(f"field '{path}' must be a list of texts, or of objects with 'completion'")


def _merge(record: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """The record with the row's values; those they replace are kept under `original`."""
    replaced = {key: record[key] for key, value in row.items() if key in record and record[key] != value}
    if not replaced:
        return {**record, **row}
    before = record.get("original")
    return {**record, **row, "original": {**replaced, **before} if isinstance(before, dict) else replaced}


# ---- Lines of the log --------------------------------------------------------------------------------


def _lines(files: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Every line that is not blank, with its place (`log.jsonl:3`)."""
    with fileinput.FileInput(files, mode="rb") as lines:
        try:
            for line in lines:
                if not line.isspace():
                    yield f"{lines.filename()}:{lines.filelineno()}", line
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read ({error.strerror}); check the path") from None


def _parse(line: bytes) -> dict[str, Any]:
    try:
        record = _DECODER.decode(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a JSON object in UTF-8 ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is wanted, found {type(record).__name__}")
    return record


def _print_table(console: Console, metrics: dict[str, float | int]) -> None:
    title, columns = f"{metrics['questions']:,} completions graded", ("metric", "value", "95 % interval")
    table = new_table(*columns, right=columns[1:], title=title)
    for name, value in metrics.items():
        if name == "questions" or name.endswith(("_low", "_high")):
            continue
        interval = ""
        if f"{name}_low" in metrics:
            interval = f"{100 * metrics[f'{name}_low']:.1f}–{100 * metrics[f'{name}_high']:.1f}"
        shown = f"{value:,.1f}" if name.startswith("tokens") else f"{100 * value:.1f} %"
        table.add_row(name, shown, interval)
    console.print(table)
