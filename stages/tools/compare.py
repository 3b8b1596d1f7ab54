"""`python -m stages compare A B`: the paired comparison of two graded logs of the same questions.

    python -m stages compare data/platinum_eval/sft.jsonl data/platinum_eval/dpo.jsonl --show lost 3

Questions are paired by id, in whatever order they come. Kept in memory is only the id of each question, its
verdict and the hash of its completion, so that logs of gigabytes can be compared.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.core.errors import UserError
from stages.core.records import read_numbered_jsonl
from stages.core.stats import Side, compare_sides, p_words, wilson
from stages.tools.fields import find, question_id, require

if TYPE_CHECKING:
    from rich.console import Console

SEED = 0  # of the bootstraps, as in the report
NAMED = 5  # questions without a partner that are named
ENDING = 600  # characters of a completion that are shown
VERDICT = "correct"


@dataclass
class Log:
    """What is kept of a log: one entry a row in each array."""

    path: Path
    name: str
    place: dict[str | int, int] = field(default_factory=dict)  # id -> its entry in the arrays
    line: array[int] = field(default_factory=lambda: array("q"))
    correct: bytearray = field(default_factory=bytearray)
    completion: array[int] = field(default_factory=lambda: array("q"))  # its hash; 0 when there is none
    samples: array[int] = field(default_factory=lambda: array("i"))
    right: array[int] = field(default_factory=lambda: array("i"))  # samples that are correct

    def side(self, order: Any, alone: int) -> Side:
        """This log's verdicts on the shared questions; `order` holds their entries."""
        sizes, first = np.unique(np.array(self.samples)[order], return_index=True)
        if len(sizes) > 1:
            lines = [self.line[order[place]] for place in first]
            raise UserError(
                f"{self.path}: {sizes[0]} samples at line {lines[0]}, {sizes[-1]} at line {lines[-1]}: every "
                "question needs the same number"
            )
        k = int(sizes[0])
        right = np.array(self.right, dtype=np.int64)[order] if k else None
        return Side(np.frombuffer(self.correct, dtype=np.bool_)[order], alone, k, right)


def main(
    a: Path,
    b: Path,
    id_field: str = "id",
    correct_field: str = VERDICT,
    show: tuple[str, int] | None = None,
    as_json: bool = False,
    console: Console | None = None,
) -> None:
    """Print the comparison of log `b` with log `a`; `show` is ('gained' | 'lost', how many questions to print).

    Raises UserError for a log that is not graded, a doubled id, or two logs that share no question.
    """
    from rich.console import Console

    console = console or Console()
    if show and (show[0] not in ("gained", "lost") or show[1] < 1):
        raise UserError(f"--show {show[0]} {show[1]}: say gained or lost, and how many, as --show lost 5")
    short = a.stem != b.stem
    log_a, log_b = (
        _read(path, path.stem if short else str(path), id_field, correct_field) for path in (a, b)
    )
    shared = [key for key in log_a.place if key in log_b.place]
    only = [
        [key for key in log.place if key not in other.place]
        for log, other in ((log_a, log_b), (log_b, log_a))
    ]
    if not shared:
        examples = " and ".join(f"{log.name} has {next(iter(log.place))!r}" for log in (log_a, log_b))
        raise UserError(f"{a} and {b} share no question id ({examples}): there is nothing to pair; see --id")
    order_a, order_b = (np.array([log.place[key] for key in shared]) for log in (log_a, log_b))
    side_a, side_b = log_a.side(order_a, len(only[0])), log_b.side(order_b, len(only[1]))
    result = compare_sides(
        side_a, side_b, _identical(log_a, log_b, order_a, order_b), log_a.name, log_b.name, SEED
    )
    for letter, side in (("a", side_a), ("b", side_b)):
        low, high = wilson(int(side.correct.sum()), len(shared))
        result |= {f"accuracy_{letter}_low": low, f"accuracy_{letter}_high": high}

    shown: list[dict[str, Any]] = []
    if show:
        changed = (
            side_b.correct & ~side_a.correct if show[0] == "gained" else side_a.correct & ~side_b.correct
        )
        chosen = np.flatnonzero(changed)[: show[1]]
        rows = [
            _rows_at(log.path, {log.line[place] for place in order[chosen]})
            for log, order in ((log_a, order_a), (log_b, order_b))
        ]
        shown = [
            {"id": shared[i], "a": rows[0][log_a.line[order_a[i]]], "b": rows[1][log_b.line[order_b[i]]]}
            for i in chosen
        ]
    if as_json:
        facts = {"a": str(a), "b": str(b), **result, "only_a_ids": only[0], "only_b_ids": only[1]}
        print(json.dumps(facts | ({"show": show[0], "shown": shown} if show else {}), indent=2))
        return
    _print(console, result, log_a.name, log_b.name, only)
    if show:
        _print_shown(console, show[0], shown, log_a.name, log_b.name)


def _read(path: Path, name: str, id_field: str, correct_field: str) -> Log:
    log = Log(path, name)
    for number, record in read_numbered_jsonl(path):
        try:
            key = question_id(require(record, id_field, "--id"), id_field)
            correct = _verdict(record, correct_field)
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        except KeyError:
            raise UserError(
                f"{path}:{number}: not graded (no field '{correct_field}'); run "
                f"`python -m stages grade {path} --out GRADED.jsonl` and compare that, or see --correct"
            ) from None
        if key in log.place:
            raise UserError(
                f"{path}: lines {log.line[log.place[key]]} and {number} have the same id {key!r}; each question "
                "may be there once"
            )
        log.place[key] = len(log.line)
        log.line.append(number)
        log.correct.append(correct)
        completion = record.get("completion")
        # Hashes of one process: two texts share one about once in 10^19 pairs.
        log.completion.append(hash(completion) or 1 if isinstance(completion, str) else 0)
        samples = record.get("samples")
        marks = [s.get(VERDICT) for s in samples if isinstance(s, dict)] if isinstance(samples, list) else []
        graded = all(isinstance(mark, bool) for mark in marks)
        log.samples.append(len(marks) if graded else 0)
        log.right.append(sum(map(bool, marks)) if graded else 0)
    if not log.line:
        raise UserError(f"{path}: holds no records")
    return log


def _verdict(record: dict[str, Any], path: str) -> bool:
    """True or false, also written as 1 and 0. Raises KeyError when it is not there, ValueError for others."""
    value = find(record, path)
    if value in (0, 1):  # False and True are
        return bool(value)
    raise ValueError(f"field '{path}' must be true or false (or 1 or 0), found {value!r:.60}")


def _identical(log_a: Log, log_b: Log, order_a: Any, order_b: Any) -> int | None:
    """Questions on which both wrote the same text; None when a log has no completions."""
    a, b = np.array(log_a.completion)[order_a], np.array(log_b.completion)[order_b]
    if not a.any() or not b.any():
        return None
    return int(((a == b) & (a != 0)).sum())


def _rows_at(path: Path, lines: set[int]) -> dict[int, dict[str, Any]]:
    """The records at some line numbers."""
    found: dict[int, dict[str, Any]] = {}
    for number, record in read_numbered_jsonl(path):
        if number in lines:
            found[number] = record
            if len(found) == len(lines):
                break
    return found


def _print(console: Console, result: dict[str, Any], name_a: str, name_b: str, only: list[list[Any]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    title = f"{name_a} → {name_b}, {result['questions']:,} questions in both"
    table = Table(
        title=escape(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, min_width=len(title)
    )
    for name in ("", escape(name_a), escape(name_b), "change", "p"):
        table.add_column(name, justify="right" if name else "left", overflow="fold")
    table.add_row("greedy", *_cells(result, "accuracy", "difference", "p"))
    table.add_row("", *_intervals(result, ("accuracy_a", "accuracy_b", "difference")), "", style="dim")
    if "mean_p" in result:
        k = {result["samples_a"], result["samples_b"]}
        table.add_row(
            f"mean@{'/'.join(map(str, sorted(k)))}", *_cells(result, "mean", "mean_difference", "mean_p")
        )
        table.add_row("", "", "", *_intervals(result, ("mean_difference",)), "", style="dim")
    console.print(table)
    for line in _lines(result, name_a, name_b, only):
        console.print(line, markup=False, highlight=False)


def _cells(result: dict[str, Any], rate: str, difference: str, p: str) -> list[str]:
    return [
        f"{100 * result[f'{rate}_a']:.1f} %",
        f"{100 * result[f'{rate}_b']:.1f} %",
        f"{100 * result[difference]:+.1f}",
        p_words(result[p]).removeprefix("p ").removeprefix("= ").replace("< ", "<"),
    ]


def _intervals(result: dict[str, Any], names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        low, high = 100 * result[f"{name}_low"], 100 * result[f"{name}_high"]
        yield f"{low:+.1f} to {high:+.1f}" if "difference" in name else f"{low:.1f}–{high:.1f}"


def _lines(result: dict[str, Any], name_a: str, name_b: str, only: list[list[Any]]) -> Iterator[str]:
    """What the table leaves to words."""
    n, same = result["questions"], result["identical_completions"]
    yield f"gained {result['gained']:,} (only {name_b} right), lost {result['lost']:,} (only {name_a} right)"
    if same is None:
        yield "identical completions: unknown, a log has no field 'completion'"
    else:
        yield f"identical completions: {same:,} of {n:,}"
    for kind, visible in (
        ("greedy", result["smallest_visible"]),
        (f"mean@{result.get('samples_b')}", result.get("mean_smallest_visible")),
    ):
        if visible is not None:
            yield f"smallest visible difference, {kind}: {ceil(1000 * visible) / 10:.1f} points"
    for name, keys in ((name_a, only[0]), (name_b, only[1])):
        if keys:
            more = f" and {len(keys) - NAMED:,} more" if len(keys) > NAMED else ""
            yield f"only in {name}, left out: {len(keys):,} ({', '.join(map(_shown, keys[:NAMED]))}{more})"
    yield f"greedy: {result['verdict']}"
    if "mean_verdict" in result:
        yield f"mean@{result['samples_b']}: {result['mean_verdict']}"


def _print_shown(console: Console, kind: str, shown: list[dict[str, Any]], name_a: str, name_b: str) -> None:
    from rich.markup import escape

    if not shown:
        console.print(f"\nno question was {kind}", highlight=False)
    for one in shown:
        console.print()
        console.rule(escape(f"{kind}: {_shown(one['id'])}"), align="left", style="dim")
        for label, text in (
            ("question", one["a"].get("question", one["b"].get("question"))),
            ("gold", one["a"].get("gold")),
            (name_a, one["a"].get("completion")),
            (name_b, one["b"].get("completion")),
        ):
            if text is not None:
                console.print(label, style="bold", markup=False, highlight=False)
                console.print(_ending(_shown(text)), markup=False, highlight=False)


def _shown(value: Any) -> str:
    """As text that any terminal takes: half a surrogate pair as its escape."""
    return str(value).encode(errors="backslashreplace").decode()


def _ending(text: str) -> str:
    text = text.strip()
    return text if len(text) <= ENDING else "... " + text[-ENDING:]
