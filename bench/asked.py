"""Is s_cf true? Whether a policy, asked a changed question, answers what its own solution said it would.

    python bench/asked.py            # after `dvc repro`, with data.changed: one or all

Taken are the right greedy solutions of Platinum. The solution of the question is run again with the twin's number, as
s_cf imagines it, and the result is compared with the policy's answer to the twin. Where it is undefined (the solution
cannot be read that far), nothing is compared. Sound, lucky and unproven are those of docs/regime-w.md.
"""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any, get_args

from common import new_parser, print_table

from stages.regime_w.scorer import solution_views
from stages.regime_w.signals import CONSTANT, Reasoning, Soundness, analyse_group, judge
from stages.regime_w.solution import Number, divide, evaluate
from stages.run.files import read_jsonl
from stages.run.params import load_params
from stages.run.paths import CHANGED, PLATINUM, PLATINUM_EVAL
from stages.run.rounds import shown
from stages.stats.one import wilson
from stages.text.answers import canonical, read_answer

JUDGED: tuple[Soundness, ...] = get_args(Soundness)
SAID = ("the twin's gold", "another number")


def main() -> None:
    """Print, for each policy and kind of solution, how often the answer to the twin is the imagined one."""
    new_parser(__doc__).parse_args()
    changes = {row["id"]: row["change"] for row in read_jsonl(CHANGED)}
    solutions = {row["id"]: row["solution"] for row in read_jsonl(PLATINUM)}
    table = []
    for name in load_params().policy_names:
        counts: Counter[tuple[str, ...]] = Counter()
        for row in read_jsonl(PLATINUM_EVAL / f"{name}.jsonl"):
            if row["correct"] and row.get("twins"):
                numbers, mine, gold = reasonings(row, solutions[row["id"]])
                kind = judge(mine, gold)
                for twin in row["twins"]:
                    counts[kind, *outcome(numbers, mine, changes[twin["id"]], twin)] += 1
        for kind in JUDGED:
            did, of = (
                [sum(counts[kind, said, one] for one in ends) for said in SAID]
                for ends in (("as said",), ("as said", "other"))
            )
            shares = [share(sum(did), sum(of)), *map(share, did, of)]
            table.append([shown(name), kind, *shares, f"{counts[kind, 'undefined']:,}"])
    print_table(
        ["policy", "solution", "as said", *(f"as said, where it is {said}" for said in SAID), "undefined"],
        table,
    )


def share(part: int, whole: int) -> str:
    """A share in percent with its Wilson interval."""
    if not whole:
        return "–"
    low, high = wilson(part, whole)
    return f"{part:,} of {whole:,}: {100 * part / whole:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def reasonings(row: dict[str, Any], solution: str) -> tuple[list[Number], Reasoning, Reasoning]:
    """The question's numbers, the reasoning of the policy's solution, and that of the gold solution."""
    texts = [{"text": row["completion"]}, {"text": solution}]
    views = solution_views(texts, [read_answer(one["text"], row["question"]) for one in texts])
    group = analyse_group(row["question"], views)
    return group.numbers, group.reasonings[0], group.reasonings[1]


def outcome(
    numbers: list[Number], mine: Reasoning, change: dict[str, Any], twin: dict[str, Any]
) -> tuple[str, ...]:
    """What the solution said of the twin, and whether the policy answered so."""
    old, new = (Fraction(change[end].replace(",", "")) for end in ("from", "to"))
    said = imagined(mine, numbers.index(old), new) if old in numbers else None
    if said is None:
        return ("undefined",)
    answer = canonical(said)
    return SAID[answer != twin["gold"]], "as said" if twin["answer"] == answer else "other"


def imagined(mine: Reasoning, place: int, new: Number) -> Number | None:
    """The answer of a solution when number `place` of the question is `new`; None when it is undefined.

    As s_cf, which only ever adds 1: an operand is an earlier result, a number of the question or a constant.
    """
    if mine.carrier is None or None in mine.counterfactuals:
        return None
    values: list[Number | None] = []
    for equation, links in zip(mine.solution.equations, mine.links, strict=True):
        inputs: list[Number | None] = []
        for operand, source in zip(equation.operands, links, strict=True):
            if source >= 0:
                inputs.append(values[source])
            elif source == CONSTANT or -2 - source != place:
                inputs.append(operand.value)
            else:
                inputs.append(divide(new, 100) if operand.percent else new)
        known = [value for value in inputs if value is not None]
        values.append(evaluate(equation.program, known) if len(known) == len(inputs) else None)
    return values[mine.carrier]


if __name__ == "__main__":
    main()
