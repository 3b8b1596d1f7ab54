"""`python -m stages suspects`: questions whose gold label is suspect, most suspect first, with the evidence.

    train-00042  suspicion 0.875: 7 of 8 agree soundly on 15, 0 give the gold's 12

Suspicion is what the coherence stage wrote to the file; what is shown as evidence is read here. Where wrong
labels were planted (generated data), it says how many of them a threshold finds.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from heapq import heappush, heapreplace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.coherence import FIELDS, gold_trace, read_views
from stages.core.answers import gold_answer, same_answer
from stages.core.errors import UserError
from stages.core.params import load_params
from stages.core.records import read_jsonl
from stages.regime_w.signals import analyse_group
from stages.tools.explain import ROLLOUTS, trace_rows

if TYPE_CHECKING:
    from rich.console import Console

THRESHOLDS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)  # the steps of eight trajectories


def main(
    rollouts: Path = ROLLOUTS,
    limit: int = 20,
    threshold: float | None = None,
    as_json: bool = False,
    console: Console | None = None,
) -> None:
    """Print the `limit` most suspect questions of a scored file, from `threshold` on (None: that of params.yaml).

    Raises UserError when the file holds no questions or no suspicion.
    """
    if threshold is None:
        threshold = load_params().regime_w.suspect_from
    found = find_suspects(rollouts, limit, threshold)
    if as_json:
        json.dump(found, sys.stdout, ensure_ascii=False, indent=2)
        print()
        return
    from rich.console import Console

    show(found, console or Console(highlight=False))


# ---- what there is to show ---------------------------------------------------------------------------


def find_suspects(path: Path, limit: int, threshold: float) -> dict[str, Any]:
    """The `limit` most suspect questions with their evidence, and counts over the whole file.

    One pass; only the questions to be shown are kept.
    """
    best: list[tuple[float, int, dict[str, Any]]] = []  # the least suspect on top; of equals the latest
    counts: dict[bool, Counter[float]] = {False: Counter(), True: Counter()}  # by planted
    for order, record in enumerate(read_jsonl(path, FIELDS)):
        value = record.get("suspicion")
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UserError(
                f"{path}: question '{record['id']}' has no suspicion; score the file with `python -m stages coherence`"
            )
        counts[record.get("planted") is True][float(value)] += 1
        if is_suspect(value, threshold):
            entry = (float(value), -order, record)
            if len(best) < limit:
                heappush(best, entry)
            elif entry > best[0]:
                heapreplace(best, entry)
    questions = sum(count.total() for count in counts.values())
    if not questions:
        raise UserError(f"{path}: holds no questions; run `dvc repro coherence`")
    return {
        "file": str(path),
        "threshold": threshold,
        "questions": questions,
        "suspects": sum(_above(count, threshold) for count in counts.values()),
        "listed": [evidence(path, record) for _, _, record in sorted(best, reverse=True)],
        "planted": list(planted_rows(counts, threshold)) if counts[True] else None,
    }


def is_suspect(suspicion: float, threshold: float) -> bool:
    """At the threshold or above; a question without any suspicion never is."""
    return suspicion > 0 and suspicion >= threshold


def _above(counts: Counter[float], threshold: float) -> int:
    return sum(count for value, count in counts.items() if is_suspect(value, threshold))


def planted_rows(counts: dict[bool, Counter[float]], threshold: float) -> Iterator[dict[str, Any]]:
    """What each threshold would find of the planted labels, and its false alarms among the others."""
    planted, others = counts[True].total(), counts[False].total()
    for value in sorted({*THRESHOLDS, threshold}):
        found, alarms = _above(counts[True], value), _above(counts[False], value)
        yield {
            "threshold": value,
            "found": found,
            "planted": planted,
            "found_share": found / planted,
            "false_alarms": alarms,
            "others": others,
            "false_alarm_share": alarms / others if others else None,
        }


def evidence(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Why a question's gold is suspect: who agrees soundly on what, who gives the gold, and how the gold fares."""
    name, rows = record["id"], record["trajectories"]
    gold = gold_answer(str(record["gold"]))
    try:
        analysis = analyse_group(record["question"], read_views(name, record["question"], rows))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    classes: dict[Any, list[int]] = {}
    for index, trace in enumerate(analysis.traces):
        if trace.answer == record.get("suspect_answer") and None not in trace.counterfactuals:
            classes.setdefault(trace.counterfactuals, []).append(index)
    agreeing = max(classes.values(), key=len, default=[])
    example = None
    if agreeing:
        place = agreeing[0]
        example = {"id": _id(record, place), "text": rows[place]["text"]}
        example |= {"equations": trace_rows(analysis.traces[place], (), None)["equations"]}
    golds = gold_trace(record.get("solution"), analysis.numbers)
    read = trace_rows(golds, (), None) if golds else None
    return {
        "id": name,
        "question": record["question"],
        "gold": gold,
        "suspicion": record["suspicion"],
        "answer": record.get("suspect_answer"),
        "agree": len(agreeing),
        "agreeing": [_id(record, place) for place in agreeing],
        "give_gold": sum(same_answer(trace.answer, gold) for trace in analysis.traces),
        "trajectories": len(rows),
        "example": example,
        "gold_equations": None if read is None else len(read["equations"]),
        "gold_failing": [one for one in read["equations"] if not one["holds"]] if read else [],
        "gold_carrier": None if read is None else read["carrier"],
        "planted": record.get("planted") is True,
    }


def _id(record: dict[str, Any], place: int) -> str:
    return str(record["trajectories"][place].get("id") or f"{record['id']}/{place}")


# ---- showing it --------------------------------------------------------------------------------------


def show(found: dict[str, Any], console: Console) -> None:
    """Print what `find_suspects` found; fits the console's width."""
    from rich.padding import Padding
    from rich.text import Text

    more = found["suspects"] - len(found["listed"])
    console.print(
        Text(
            f"{found['suspects']:,} of {found['questions']:,} questions have a suspicion of {found['threshold']:g} "
            f"or more" + (f"; the first {len(found['listed'])}" if more else ""),
            "bold",
        )
    )
    for row in found["listed"]:
        title = Text.assemble(
            (f"\n{row['id']}", "bold"), f"  suspicion {row['suspicion']:.3f}  gold {row['gold']}, "
        )
        title.append(f"instead {row['answer']}", "yellow")
        title.append("  planted" if row["planted"] else "", "magenta")
        console.print(title)
        lines = [Text(row["question"], "italic")]
        lines.append(
            Text(
                f"{row['agree']} of {row['trajectories']} agree soundly on {row['answer']}; "
                f"{row['give_gold']} give{'s' * (row['give_gold'] == 1)} {row['gold']}"
            )
        )
        lines.append(Text(gold_words(row), "red" if row["gold_failing"] else ""))
        for line in lines:
            console.print(Padding(line, (0, 0, 0, 2)))
        if row["example"]:
            console.print(Padding(Text(f"{row['example']['id']}:", "dim"), (0, 0, 0, 2)))
            console.print(Padding(Text(row["example"]["text"].strip()), (0, 0, 0, 4)))
    if found["planted"]:
        _print_planted(found, console)


def gold_words(row: dict[str, Any]) -> str:
    """How the gold solution's own equations fare."""
    if row["gold_equations"] is None:
        return "the file has no gold solution"
    if row["gold_failing"]:
        wrong = ", ".join(
            f"{one['name']} {one['written']} does not hold ({one['computed'] or 'division by 0'})"
            for one in row["gold_failing"]
        )
        return f"gold solution: {wrong}"
    if row["gold_carrier"] is None:
        equations = f"{row['gold_equations']} equation{'s' * (row['gold_equations'] != 1)}"
        return f"gold solution: none of its {equations} gives {row['gold']}"
    return f"gold solution: its equations hold, and {row['gold_carrier']} gives {row['gold']}"


def _print_planted(found: dict[str, Any], console: Console) -> None:
    """The planted labels found at the threshold, and a table over thresholds."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("threshold", "planted found", "share", "false alarms", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found["planted"]:
        own = row["threshold"] == found["threshold"]
        shares = [
            "–" if row[key] is None else f"{row[key]:.1%}" for key in ("found_share", "false_alarm_share")
        ]
        found_cell = f"{row['found']:,} of {row['planted']:,}"
        alarm_cell = f"{row['false_alarms']:,} of {row['others']:,}"
        table.add_row(
            f"{'> ' if own else ''}{row['threshold']:g}", found_cell, shares[0], alarm_cell, shares[1],
            style="bold" if own else None,
        )  # fmt: skip
        if own:
            console.print(
                f"\nPlanted wrong labels found at {row['threshold']:g}: {found_cell}; "
                f"false alarms among the others: {alarm_cell} ({shares[1]})",
                style="bold",
            )
    console.print(table)
