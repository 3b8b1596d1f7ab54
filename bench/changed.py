"""Changed questions: how fast they are made, some to read, and whether golds that others published agree.

    python bench/changed.py platinum.jsonl                             # speed, and refusals by reason
    python bench/changed.py platinum.jsonl --read 100 --seed 5         # also 100 twins to read, one by one
    python bench/changed.py gsm8k_test.jsonl --against gsmplus.jsonl varbench_40.jsonl

FILE holds `question` and `answer` as GSM8K does. A file for `--against` holds questions with other numbers: GSM-Plus's
(`seed_question`, `seed_solution`, `question`, `answer`; of the kinds that change numbers only), or VarBench's (`index`
of the question in FILE, `question`, `answer`). Where the text differs from its original in digit numbers alone and the
rules accept the change, our gold is compared with the published one; every difference is printed, to be judged.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from common import new_parser, note, print_table

from stages.regime_w.changed import REASONS, ChangeCounts, Changer, Refused, changed_rows
from stages.regime_w.question import read_question
from stages.regime_w.solution import Number, normal
from stages.run.files import read_jsonl
from stages.text.answers import gold_answer

NUMBERS_ONLY = ("numerical substitution", "digit expansion")
TOKEN = re.compile(r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+|[A-Za-z]+|[^\sA-Za-z0-9]")


def main() -> None:
    """Time the twins of FILE, print some, compare with published ones, print the refusals last."""
    parser = new_parser(__doc__)
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--read", type=int, default=0, metavar="N", help="print N twins drawn by the seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--against", type=Path, nargs="+", default=[], metavar="FILE")
    options = parser.parse_args()
    rows = [
        row(f"{options.file.stem}-{n:05d}", r["question"], r["answer"])
        for n, r in enumerate(read_jsonl(options.file))
    ]
    columns: list[tuple[float, ChangeCounts]] = []
    for change in ("one", "all"):
        counts, started = ChangeCounts(), time.process_time()
        made = list(changed_rows(rows, change, options.seed, counts))
        columns.append((time.process_time() - started, counts))
        if change == "one":
            read(made, {r["id"]: r for r in rows}, options.read, options.seed)
    table = [["questions", *(f"{counts.questions:,}" for _, counts in columns)]]
    table += [["with a twin", *(f"{counts.with_twin:,}" for _, counts in columns)]]
    table += [["twins", *(f"{counts.twins:,}" for _, counts in columns)]]
    table += [["questions a second", *(f"{counts.questions / seconds:,.0f}" for seconds, counts in columns)]]
    table += [["twins a second", *(f"{counts.twins / seconds:,.0f}" for seconds, counts in columns)]]
    table += [
        [words, *(f"{counts.refused[reason]:,}" for _, counts in columns)]
        for reason, words in REASONS.items()
    ]
    for path in options.against:
        agreed, compared, all_rows = against(path, rows)
        note(
            f"{path.name}: {agreed:,} of {compared:,} golds agree, of {all_rows:,} rows that change numbers only"
        )
    print_table(["", "one a question", "every number"], table)


def row(name: str, question: str, answer: str) -> dict[str, Any]:
    """A row as `changed_rows` reads it."""
    return {"id": name, "question": question, "solution": answer, "gold": gold_answer(answer)}


def read(made: list[dict[str, Any]], rows: dict[str, dict[str, Any]], count: int, seed: int) -> None:
    """Print `count` twins drawn by `seed`: the question with its change marked, the gold solution, the new gold."""
    for twin in random.Random(seed).sample(made, min(count, len(made))):
        origin, change = rows[twin["of"]], twin["change"]
        start, end = change["start"], change["start"] + len(change["from"])
        text = origin["question"]
        print(f"{twin['id']}  {text[:start]}[{change['from']} -> {change['to']}]{text[end:]}")
        print(f"    {origin['solution']}\n    -> {twin['gold']}\n".replace("\n", "\n    ").rstrip() + "\n")


def against(path: Path, rows: list[dict[str, Any]]) -> tuple[int, int, int]:
    """How many golds agree, of how many compared, of how many rows; prints each difference."""
    agreed = compared = total = 0
    for origin, published in pairs(path, rows):
        changes = changed_numbers(origin["question"], published["question"])
        total += changes is not None
        if not changes:
            continue
        try:
            gold = Changer(origin["question"], origin["solution"], origin["gold"]).gold_after(changes)
        except Refused:
            continue
        theirs = gold_answer(published["answer"])
        if gold is None or theirs is None:
            continue
        compared += 1
        # Theirs is often rounded to cents.
        if abs(Fraction(gold) - Fraction(theirs)) < Fraction(1, 100):
            agreed += 1
        else:
            print(
                f"differs: {published['question']}\n    ours {gold}, theirs {theirs}; {origin['solution']}\n"
            )
    return agreed, compared, total


def pairs(path: Path, rows: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each published row with its original."""
    for published in read_jsonl(path):
        if "index" in published:
            yield rows[published["index"]], published
        elif published["perturbation_type"] in NUMBERS_ONLY:
            yield row("", published["seed_question"], published["seed_solution"]), published


def changed_numbers(before: str, after: str) -> dict[int, Number] | None:
    """The digit numbers of `before` that differ in `after`, by place; None where more than numbers differ."""
    numbers = read_question(before).numbers
    places = {number.start: place for place, number in enumerate(numbers)}
    old, new = list(TOKEN.finditer(before)), list(TOKEN.finditer(after))
    if len(old) != len(new):
        return None
    changes: dict[int, Number] = {}
    for a, b in zip(old, new, strict=True):
        if a[0].lower() == b[0].lower() or (a[0] in "'’" and b[0] in "'’"):
            continue
        if a.start() not in places or not b[0][-1].isdigit():
            return None
        value = normal(Fraction(b[0].replace(",", "")))
        if value != numbers[places[a.start()]].value:
            changes[places[a.start()]] = value
    return changes


if __name__ == "__main__":
    main()
