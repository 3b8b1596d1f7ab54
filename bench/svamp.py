"""Make the files of SVAMP and of its training set, MAWPS and ASDiv-A, in this pipeline's format.

    git clone https://github.com/arkilpatel/SVAMP ../svamp-source        # MIT
    python bench/svamp.py ../svamp-source ../svamp

Writes train.jsonl and test.jsonl into the second folder, for `data: {source: files}` and own.train and own.platinum in
params.yaml. A solution has one line for each operation of the published equation, with its annotation:

    - number0 * number1 number2   ->   1500 * 8 = <<1500*8=12000>>12000
                                       25000 - 12000 = <<25000-12000=13000>>13000
                                       #### 13000

Left out, and counted: rows whose equation does not give the answer, answers with no short decimal, doubled questions.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from common import new_parser, note

TRAIN, TEST = "data/mawps-asdiv-a_svamp/train.csv", "SVAMP.json"
OPERATORS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}
DECIMALS = 4  # of a number in a solution; what is computed has more
CLOSE = Fraction(1, 10**6)  # the published 0.33333333 is meant to be a third
Tree = Fraction | tuple[str, "Tree", "Tree"]


def main() -> None:
    """Run the script."""
    parser = new_parser(__doc__)
    parser.add_argument("source", type=Path, help="a clone of arkilpatel/SVAMP")
    parser.add_argument("folder", type=Path, help="where train.jsonl and test.jsonl go")
    options = parser.parse_args()
    for name in (TRAIN, TEST):
        if not (options.source / name).is_file():
            raise SystemExit(f"{options.source / name}: there is no such file; clone arkilpatel/SVAMP there")
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, published in (("train", train_rows), ("test", test_rows)):
        path, counts = options.folder / f"{name}.jsonl", Counter[str]()
        with path.open("w", encoding="utf-8") as file:
            for row in kept(published(options.source), counts):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        note(f"{path}: {', '.join(f'{count:,} {what}' for what, count in counts.items())}")


def train_rows(source: Path) -> Iterator[tuple[str, Tree, Fraction]]:
    """(question, equation, answer) of each row of MAWPS and ASDiv-A; `number0` in a text stands for a number."""
    with (source / TRAIN).open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            values = {f"number{place}": value for place, value in enumerate(row["Numbers"].split())}
            words = [
                short(Fraction(values[word])) if word in values else word for word in row["Question"].split()
            ]
            symbols = iter(row["Equation"].split())
            # The texts are cut into tokens: `Sam 's`, `did n't`.
            yield " ".join(words).replace(" '", "'"), prefix_tree(symbols, values), Fraction(row["Answer"])


def test_rows(source: Path) -> Iterator[tuple[str, Tree, Fraction]]:
    """(question, equation, answer) of each row of SVAMP."""
    for row in json.loads((source / TEST).read_text(encoding="utf-8")):
        body = row["Body"].strip()
        stop = "" if body.endswith((".", ",", "?", "!")) else "."
        yield (
            f"{body}{stop} {row['Question'].strip()}",
            infix_tree(row["Equation"].split()),
            Fraction(str(row["Answer"])),
        )


def prefix_tree(symbols: Iterator[str], values: dict[str, str]) -> Tree:
    """The equation `- number0 * number1 number2` as a tree."""
    symbol = next(symbols)
    if symbol in OPERATORS:
        return symbol, prefix_tree(symbols, values), prefix_tree(symbols, values)
    return Fraction(values.get(symbol, symbol))


def infix_tree(symbols: list[str]) -> Tree:
    """The equation `( ( 8.0 - 3.0 ) / 5.0 )` as a tree; each operation has its brackets."""
    stack: list[Any] = []
    for symbol in symbols:
        if symbol == ")":
            left, operator, right = stack[-3:]
            stack[-3:] = [(operator, left, right)]
        elif symbol in OPERATORS:
            stack.append(symbol)
        elif symbol != "(":
            stack.append(Fraction(symbol))
    (tree,) = stack
    return tree


def kept(rows: Iterator[tuple[str, Tree, Fraction]], counts: Counter[str]) -> Iterator[dict[str, str]]:
    """The rows to write, in their order; `counts` says how many were kept and left out, and why."""
    seen = set()
    for question, tree, answer in rows:
        question = re.sub(r" (?=[.,?!;:]|'s\b)", "", " ".join(question.split()))
        steps: list[str] = []
        try:
            value = solve(tree, steps)
        except ZeroDivisionError:
            value = None
        if value is None or short(value) != short(answer) or not steps:
            counts["with another answer than their equation"] += 1
        elif abs(Fraction(short(value)) - value) > CLOSE:
            counts["without a short decimal"] += 1
        elif question in seen:
            counts["doubled"] += 1
        else:
            seen.add(question)
            counts["kept"] += 1
            yield {"question": question, "answer": "\n".join([*steps, f"#### {short(answer)}"])}


def solve(tree: Tree, steps: list[str]) -> Fraction:
    """The value of an equation; a line for each operation is added to `steps`."""
    if isinstance(tree, Fraction):
        return tree
    operator, left, right = tree
    a, b = solve(left, steps), solve(right, steps)
    value = OPERATORS[operator](a, b)
    x, y, z = short(a), short(b), short(value)
    steps.append(f"{x} {operator} {y} = <<{x}{operator}{y}={z}>>{z}")
    return value


def short(value: Fraction) -> str:
    """A number as it is written in a question: `56`, `2.5`, `0.3333`."""
    return f"{float(round(value, DECIMALS)):.{DECIMALS}f}".rstrip("0").rstrip(".")


if __name__ == "__main__":
    main()
