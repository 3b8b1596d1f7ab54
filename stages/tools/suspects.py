"""`python -m stages suspects`: questions whose gold label is suspect, most suspect first, with the evidence.

Suspicion is what the coherence stage wrote to the file; what is shown as evidence is read here. Where wrong
labels were planted (generated data), a table says how many of them each threshold finds.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import nlargest
from pathlib import Path

from rich.console import Console
from rich.text import Text

from stages.regime_w.record import read_questions
from stages.regime_w.signals import Reasoning
from stages.run.errors import UserError
from stages.run.params import load_params
from stages.run.paths import LAST
from stages.text.answers import same_answer
from stages.tools.explain import read_question, reasoning_rows
from stages.tools.show import Row, indented, new_console, new_table

THRESHOLDS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)  # the steps of eight trajectories


def main(rollouts: Path = LAST.scored, limit: int = 20, threshold: float | None = None) -> None:
    """Print the `limit` most suspect questions of a scored file, from `threshold` on (None: that of params.yaml).

    Reads the file once, and keeps only the questions to be shown. Raises UserError when it holds no questions or no
    suspicion.
    """
    if threshold is None:
        threshold = load_params().regime_w.suspect_from
    # The suspicion of each question, by whether its wrong label was planted.
    seen: dict[bool, list[float]] = {False: [], True: []}
    most = nlargest(limit, suspects(rollouts, threshold, seen), key=lambda record: record["suspicion"])
    everything = seen[False] + seen[True]
    if not everything:
        raise UserError(f"{rollouts}: holds no questions; run `dvc repro`")
    console, found = new_console(), count(everything, threshold)
    first = f"; the first {len(most)}" if len(most) < found else ""
    words = f"{found:,} of {len(everything):,} questions have a suspicion of {threshold:g} or more{first}"
    console.print(words, style="bold")
    for record in most:
        show(rollouts, record, console)
    if seen[True]:
        console.print("\nWhat each threshold finds of the wrong labels that were planted", style="bold")
        columns = ("threshold", "planted found", "false alarms")
        table = new_table(*columns, right=columns)
        for value in sorted({*THRESHOLDS, threshold}):
            own = value == threshold
            shares = (_share(count(seen[planted], value), len(seen[planted])) for planted in (True, False))
            table.add_row(f"{'> ' * own}{value:g}", *shares, style="bold" if own else None)
        console.print(table)


def suspects(path: Path, threshold: float, seen: dict[bool, list[float]]) -> Iterator[Row]:
    """The suspect questions of a file. Adds the suspicion of every question to `seen`."""
    for record in read_questions(path, scored=True):
        value = record.get("suspicion")
        if value is None:
            raise UserError(
                f"{path}: question '{record['id']}' has no suspicion; score the file with `python -m stages coherence`"
            )
        seen[record.get("planted") is True].append(value)
        if count([value], threshold):
            yield record


def count(suspicions: list[float], threshold: float) -> int:
    """How many are at the threshold or above; a question without any suspicion never is."""
    return sum(value > 0 and value >= threshold for value in suspicions)


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,}" + (f" ({part / whole:.1%})" if whole else "")


def show(path: Path, record: Row, console: Console) -> None:
    """Print why a question's gold is suspect: who agrees soundly on what, who gives the gold, how the gold fares."""
    gold, _, group, golds = read_question(path, record)
    other = record.get("suspect_answer")
    agreeing = largest_agreement(group.reasonings, other)
    given = sum(same_answer(reasoning.answer, gold) for reasoning in group.reasonings)
    title = Text.assemble(
        (f"\n{record['id']}", "bold"), f"  suspicion {record['suspicion']:.3f}  gold {gold}, "
    )
    title.append(f"instead {other}", "yellow")
    title.append("  planted" if record.get("planted") is True else "", "magenta")
    console.print(title)
    console.print(indented(Text(record["question"], "italic")))
    agree = f"{len(agreeing)} of {len(group.reasonings)} agree soundly on {other}"
    console.print(indented(f"{agree}; {given} give{'s' * (given == 1)} {gold}"))
    words = gold_words(gold, reasoning_rows(golds, (), None) if golds else None)
    console.print(indented(Text(words, "red" if "does not hold" in words else "")))
    if agreeing:
        row = record["trajectories"][agreeing[0]]
        console.print(indented(Text(f"{row['id']}:", "dim")))
        console.print(indented(row["text"].strip(), 4))


def largest_agreement(reasonings: list[Reasoning], answer: str | None) -> list[int]:
    """The places of the most trajectories with this answer that also move alike when a number changes."""
    classes: dict[tuple[object, ...], list[int]] = {}
    for index, reasoning in enumerate(reasonings):
        if reasoning.answer == answer and None not in reasoning.counterfactuals:
            classes.setdefault(reasoning.counterfactuals, []).append(index)
    return max(classes.values(), key=len, default=[])


def gold_words(gold: str, solution: Row | None) -> str:
    """How the gold solution's own equations fare."""
    if solution is None:
        return "the file has no gold solution"
    failing = [
        f"{one['name']} {one['written']} does not hold ({one['computed'] or 'division by 0'})"
        for one in solution["equations"]
        if not one["holds"]
    ]
    if failing:
        return f"gold solution: {', '.join(failing)}"
    if solution["carrier"] is None:
        return f"gold solution: none of its equations gives {gold}"
    return f"gold solution: its equations hold, and {solution['carrier']} gives {gold}"
