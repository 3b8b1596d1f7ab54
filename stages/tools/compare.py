"""`python -m stages compare A B`: the paired comparison of two graded logs of the same questions.

Questions are paired by id, in whatever order they come. Only the id of each question, its verdict and the hash of
its completion stay in memory, so that logs of gigabytes can be compared.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from stages.regime_w.record import same_id
from stages.run.errors import UserError
from stages.run.files import read_numbered_jsonl
from stages.stats.one import BOOTSTRAP_SEED, wilson
from stages.stats.p_value import p_words
from stages.stats.paired import Side, compare_sides, paired_rates
from stages.tools.fields import find, question_id, require
from stages.tools.log_votes import LogVotes
from stages.tools.show import at_most, new_console, new_table, print_json, printable

NAMED = 5  # questions without a partner that are named
ENDING = 600  # characters of a completion that are shown
VERDICT = "correct"


@dataclass
class Log:
    """What is kept of a log: one entry a row in each array."""

    path: Path
    place: dict[str, int] = field(default_factory=dict)  # id -> its entry in the arrays
    line: array[int] = field(default_factory=lambda: array("q"))
    correct: bytearray = field(default_factory=bytearray)
    completion: array[int] = field(default_factory=lambda: array("q"))  # its hash; 0 when there is none
    samples: array[int] = field(default_factory=lambda: array("i"))
    right: array[int] = field(default_factory=lambda: array("i"))  # samples that are correct
    elected: array[float] = field(default_factory=lambda: array("d"))  # of the vote, when there is one

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
    vote: str | None = None,
) -> None:
    """Print the comparison of log `b` with log `a`; `show` is ('gained' | 'lost', how many questions to print).

    `vote` names the signal by which the samples vote; then the elected answers are compared, too.
    Raises UserError for a log that is not graded, a doubled id, or two logs that share no question.
    """
    if show and (show[0] not in ("gained", "lost") or show[1] < 1):
        raise UserError(f"--show {show[0]} {show[1]}: say gained or lost, and how many, as --show lost 5")
    name_a, name_b = (a.stem, b.stem) if a.stem != b.stem else (str(a), str(b))
    votes = LogVotes(vote) if vote else None
    log_a, log_b = (_read(path, id_field, correct_field, votes) for path in (a, b))
    shared = [key for key in log_a.place if key in log_b.place]
    if not shared:
        ids = f"{name_a} has {next(iter(log_a.place))!r} and {name_b} has {next(iter(log_b.place))!r}"
        raise UserError(f"{a} and {b} share no question id ({ids}): there is nothing to pair; see --id")
    only_a = [key for key in log_a.place if key not in log_b.place]
    only_b = [key for key in log_b.place if key not in log_a.place]
    order_a, order_b = (np.array([log.place[key] for key in shared]) for log in (log_a, log_b))
    side_a, side_b = log_a.side(order_a, len(only_a)), log_b.side(order_b, len(only_b))
    texts_a, texts_b = np.array(log_a.completion)[order_a], np.array(log_b.completion)[order_b]
    same = int(((texts_a == texts_b) & (texts_a != 0)).sum()) if texts_a.any() and texts_b.any() else None
    result = compare_sides(side_a, side_b, same, name_a, name_b, BOOTSTRAP_SEED)
    if votes:
        elected_a, elected_b = np.array(log_a.elected)[order_a], np.array(log_b.elected)[order_b]
        paired = paired_rates(elected_a, elected_b, (name_a, name_b), BOOTSTRAP_SEED)
        result |= {"vote": vote, "coherent_a": float(elected_a.mean()), "coherent_b": float(elected_b.mean())}
        result |= {f"coherent_{key}": value for key, value in paired.items()}
    for letter, side in (("a", side_a), ("b", side_b)):
        low, high = wilson(int(side.correct.sum()), len(shared))
        result |= {f"accuracy_{letter}_low": low, f"accuracy_{letter}_high": high}
    if as_json:
        print_json({"a": str(a), "b": str(b), **result, "only_a_ids": only_a, "only_b_ids": only_b})
        return
    console = new_console()
    _print(console, result, (name_a, only_a), (name_b, only_b))
    if show:
        before, after = (side_a, side_b) if show[0] == "gained" else (side_b, side_a)
        changed = np.flatnonzero(after.correct & ~before.correct)[: show[1]]
        rows = zip(_rows_at(log_a, order_a[changed]), _rows_at(log_b, order_b[changed]), strict=True)
        if not len(changed):
            console.print(f"\nno question was {show[0]}")
        for i, (row_a, row_b) in zip(changed, rows, strict=True):
            console.print()
            console.rule(f"{show[0]}: {printable(str(shared[i]))}", align="left", style="dim")
            _print_shown(console, row_a, row_b, name_a, name_b)


def _read(path: Path, id_field: str, correct_field: str, votes: LogVotes | None) -> Log:
    log = Log(path)
    for number, record in read_numbered_jsonl(path):
        try:
            key = question_id(require(record, id_field, "--id"), id_field)
            correct = _verdict(record, correct_field)
            if votes:
                log.elected.append(votes.elected(record))
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        except KeyError:
            raise UserError(
                f"{path}:{number}: not graded (no field '{correct_field}'); run "
                f"`python -m stages grade {path} --out GRADED.jsonl` and compare that, or see --correct"
            ) from None
        if key in log.place:
            raise same_id(path, log.line[log.place[key]], number, key)
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


def _rows_at(log: Log, entries: Any) -> list[dict[str, Any]]:
    """The records of some entries, read again."""
    lines = [log.line[entry] for entry in entries]
    found = ((number, record) for number, record in read_numbered_jsonl(log.path) if number in lines)
    records = dict(islice(found, len(lines)))
    return [records[line] for line in lines]


# ---- What is printed ---------------------------------------------------------------------------------


def _print(console: Console, result: dict[str, Any], *sides: tuple[str, list[Any]]) -> None:
    """Print the statistics; `sides` are the logs' names, each with the ids that only this log has."""
    (name_a, _), (name_b, _) = sides
    n, same = result["questions"], result["identical_completions"]
    title = f"{name_a} → {name_b}, {n:,} questions in both"
    columns = ("", name_a, name_b, "change", "p")
    table = new_table(*columns, right=columns[1:], title=title, min_width=len(title))
    table.add_row("greedy", *_cells(result, "accuracy", "difference", "p"))
    intervals = [_interval(result, name) for name in ("accuracy_a", "accuracy_b", "difference")]
    table.add_row("", *intervals, style="dim")
    if "mean_p" in result:
        k = sorted({result["samples_a"], result["samples_b"]})
        table.add_row(f"mean@{'/'.join(map(str, k))}", *_cells(result, "mean", "mean_difference", "mean_p"))
        table.add_row("", "", "", _interval(result, "mean_difference"), style="dim")
    if "coherent_p" in result:
        cells = _cells(result, "coherent", "coherent_difference", "coherent_p")
        table.add_row(f"voted by {result['vote']}", *cells)
        table.add_row("", "", "", _interval(result, "coherent_difference"), style="dim")
    console.print(table)
    console.print(
        f"gained {result['gained']:,} (only {name_b} right), lost {result['lost']:,} (only {name_a} right)"
    )
    known = f"{same:,} of {n:,}" if same is not None else "unknown, a log has no field 'completion'"
    console.print(f"identical completions: {known}")
    for name, keys in sides:
        if keys:
            named = printable(", ".join(at_most(NAMED, list(map(str, keys)))))
            console.print(f"only in {name}, left out: {len(keys):,} ({named})")
    console.print(f"greedy: {result['verdict']}")
    if "mean_p" in result:
        console.print(f"mean@{result['samples_b']}: {result['mean_verdict']}")
    if "coherent_p" in result:
        console.print(f"voted by {result['vote']}: {result['coherent_verdict']}")


def _cells(result: dict[str, Any], rate: str, difference: str, p: str) -> list[str]:
    return [
        f"{100 * result[f'{rate}_a']:.1f} %",
        f"{100 * result[f'{rate}_b']:.1f} %",
        f"{100 * result[difference]:+.1f}",
        p_words(result[p]).removeprefix("p ").removeprefix("= ").replace("< ", "<"),
    ]


def _interval(result: dict[str, Any], name: str) -> str:
    low, high = 100 * result[f"{name}_low"], 100 * result[f"{name}_high"]
    return f"{low:+.1f} to {high:+.1f}" if "difference" in name else f"{low:.1f}–{high:.1f}"


def _print_shown(console: Console, a: dict[str, Any], b: dict[str, Any], name_a: str, name_b: str) -> None:
    for label, value in (
        ("question", a.get("question", b.get("question"))),
        ("gold", a.get("gold")),
        (name_a, a.get("completion")),
        (name_b, b.get("completion")),
    ):
        if value is not None:
            text = printable(str(value)).strip()
            console.print(label, style="bold")
            console.print(text if len(text) <= ENDING else "... " + text[-ENDING:])
