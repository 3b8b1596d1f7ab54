"""The coherence signals of Regime W: how far the trajectories of one question agree, and why.

    score_group(question, [{"text": ..., "answer": "10"}, ...]).s_wm   ->  [0.644444, 0.644444, 0.622222, 0.0]

s_end: the same final answer. s_path: the same intermediate values. s_cf: the same answer when a number of the
question changes. Everything depends on the texts and answers of one question only, never on the gold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import fsum
from typing import Any, Literal

from stages.regime_w.solution import (
    MAX_BITS,
    Equation,
    Number,
    Solution,
    Step,
    calculate,
    divide,
    evaluate,
    normal,
    question_numbers,
    read_solution,
)

SIGNALS = ("s_end", "s_path", "s_cf", "s_wm")
DEFAULT_WEIGHTS = (0.5, 0.3, 0.2)
CONSTANT = -1
Soundness = Literal["sound", "lucky", "unproven"]


@dataclass(slots=True, frozen=True)
class GroupScore:
    """The signals of one question's trajectories, each a list in their order, values in [0, 1]."""

    s_end: list[float]
    s_path: list[float]
    s_cf: list[float]
    s_wm: list[float]

    def mean(self, signal: str) -> float:
        """A signal's mean over the trajectories: the question's own; 0 without any."""
        values = getattr(self, signal)
        return fsum(values) / len(values) if values else 0.0


@dataclass(slots=True, frozen=True)
class Reasoning:
    """The reasoning of one trajectory, as far as it could be read.

    `links[k][p]` says where operand p of equation k comes from: an earlier equation's index, `CONSTANT`, or -2 - m for
    number m of the question. `carrier` is the equation with the final answer. `counterfactuals[m]` is the answer when
    number m grows by 1, None when it is undefined. Without numbers in the question there is one counterfactual. `moves`
    counts the numbers with which the answer moves.
    """

    answer: str | None
    solution: Solution
    links: list[list[int]]
    carrier: int | None
    counterfactuals: tuple[Number | None, ...]
    moves: int
    values: Counter[Number]


@dataclass(slots=True, frozen=True)
class GroupAnalysis:
    """The numbers of a question, and the reasoning of each trajectory: one object for equal texts and answers."""

    numbers: list[Number]
    reasonings: list[Reasoning]

    def score(self, weights: Sequence[float] = DEFAULT_WEIGHTS) -> GroupScore:
        """The four signals. All are 0 when there is only one trajectory."""
        # Trajectories with the same answer, values and counterfactuals are alike to all others: they are compared once.
        alike: dict[Any, list[int]] = {}
        for index, reasoning in enumerate(self.reasonings):
            values = frozenset(reasoning.values.items())
            alike.setdefault((reasoning.answer, reasoning.counterfactuals, values), []).append(index)
        groups = list(alike.values())
        distinct = [self.reasonings[group[0]] for group in groups]
        size, others = len(distinct), len(self.reasonings) - 1
        end = [0] * size
        path: list[list[float]] = [[] for _ in range(size)]
        cf = [0] * size
        for i, a in enumerate(distinct):
            for j in range(i, size):
                b = distinct[j]
                same_end = a.answer is not None and a.answer == b.answer
                overlap = _overlap(a.values, b.values)
                agreed = _agreed(a.counterfactuals, b.counterfactuals)
                pairs = ((i, len(groups[i]) - 1),) if i == j else ((i, len(groups[j])), (j, len(groups[i])))
                for one, times in pairs:
                    end[one] += times * same_end
                    path[one] += [overlap] * times
                    cf[one] += times * agreed
        interventions = max(1, len(self.numbers))
        total = weights[0] + weights[1] + weights[2]
        columns = [[0.0] * len(self.reasonings) for _ in SIGNALS]
        for i, group in enumerate(groups):
            if others > 0:
                s_end = end[i] / others
                s_path = min(1.0, fsum(path[i]) / others)
                s_cf = cf[i] / (interventions * others)
            else:
                s_end = s_path = s_cf = 0.0
            s_wm = (weights[0] * s_end + weights[1] * s_path + weights[2] * s_cf) / total
            for column, value in zip(columns, (s_end, s_path, s_cf, s_wm), strict=True):
                for index in group:
                    column[index] = value
        return GroupScore(*columns)


def score_group(
    question: str, trajectories: Sequence[Mapping[str, Any]], weights: Sequence[float] = DEFAULT_WEIGHTS
) -> GroupScore:
    """The signals of one question's trajectories; each has `text` (the solution only) and `answer` (or None).

    `weights` are those of s_end, s_path and s_cf in s_wm. This is the function a scorer file must offer.
    """
    return analyse_group(question, trajectories).score(weights)


def analyse_group(question: str, trajectories: Sequence[Mapping[str, Any]]) -> GroupAnalysis:
    """Read each distinct text of a question once, and re-run the same equations once."""
    numbers = question_numbers(question)
    places = {number: index for index, number in enumerate(numbers)}
    reasonings: dict[tuple[str, str | None], Reasoning] = {}
    known: dict[Any, Reasoning] = {}
    ordered = []
    for trajectory in trajectories:
        key = text, answer = (trajectory["text"], trajectory["answer"])
        reasoning = reasonings.get(key)
        if reasoning is None:
            solution = read_solution(text)
            # All but their places in the text.
            equations = (answer, tuple([equation[2:] for equation in solution.equations]))
            if same := known.get(equations):
                reasoning = replace(same, solution=solution)
            else:
                reasoning = known[equations] = reason(numbers, places, solution, answer)
            reasonings[key] = reasoning
        ordered.append(reasoning)
    return GroupAnalysis(numbers, ordered)


def read_reasoning(
    numbers: list[Number], places: Mapping[Number, int], text: str, answer: str | None
) -> Reasoning:
    """Equations, links and counterfactuals of one text. `places` gives each question number's index."""
    return reason(numbers, places, read_solution(text), answer)


def reason(
    numbers: list[Number], places: Mapping[Number, int], solution: Solution, answer: str | None
) -> Reasoning:
    """Links and counterfactuals of a solution that was read."""
    equations = solution.equations
    latest: dict[Number, int] = {}
    links: list[list[int]] = []
    for index, equation in enumerate(equations):
        row = []
        for operand in equation.operands:
            source = latest.get(operand.value if operand.percent else operand.printed)
            if source is None:
                place = places.get(operand.printed)
                source = CONSTANT if place is None else -2 - place
            row.append(source)
        links.append(row)
        latest[equation.value] = index
    carrier = None if answer is None else latest.get(_answer_number(answer))
    found: tuple[Number | None, ...] = (None,) * max(1, len(numbers))
    moves = 0
    if carrier is not None:
        found, moves = _rerun(equations, links, carrier, numbers)
    return Reasoning(answer, solution, links, carrier, found, moves, Counter([e.value for e in equations]))


def judge(mine: Reasoning, golds: Reasoning) -> Soundness:
    """Soundness of a correct trajectory: does its answer follow the gold's when a number of the question changes?

    'sound': it does, for every number. 'unproven': for some number one of the two is undefined. 'lucky': it does not.
    """
    if None in mine.counterfactuals or None in golds.counterfactuals:
        return "unproven"
    return "sound" if mine.counterfactuals == golds.counterfactuals else "lucky"


def _answer_number(answer: str) -> Number:
    return int(answer) if answer.removeprefix("-").isdigit() else normal(Fraction(answer))


def _rerun(
    equations: tuple[Equation, ...], links: list[list[int]], carrier: int, numbers: list[Number]
) -> tuple[tuple[Number | None, ...], int]:
    """The carrier's value with each question number grown by 1, and how many of these differ from what it is.

    All are None when a step does not hold.
    """
    undefined = (None,) * max(1, len(numbers)), 0
    waiting, needed = [carrier], {carrier}
    while waiting:
        step = waiting.pop()
        if not equations[step].holds:
            return undefined
        for source in links[step]:
            if source >= 0 and source not in needed:
                needed.add(source)
                waiting.append(source)
    # `values` holds what the operands stand for: question numbers, constants, results. Each step gets its places there.
    values: list[Number] = [*numbers]
    percents: dict[int, int] = {}  # place of a question number -> place of its hundredth
    places: dict[int, int] = {}  # step -> place of its result
    moves: dict[int, int] = {CONSTANT: 0}  # which question numbers a step depends on, as bits
    steps: list[tuple[int, int, tuple[Step, ...], list[int]]] = []
    for step in sorted(needed):
        equation, inputs, bits = equations[step], [], 0
        for operand, source in zip(equation.operands, links[step], strict=True):
            if source >= 0:
                inputs.append(places[source])
                bits |= moves[source]
            elif source == CONSTANT:
                inputs.append(len(values))
                values.append(operand.value)
            else:
                place = -2 - source
                bits |= 1 << place
                if operand.percent:
                    place = percents.setdefault(place, len(values))
                    values.append(operand.value)
                inputs.append(place)
        value = evaluate(equation.program, [values[place] for place in inputs])
        if value is None or _huge(value):
            return undefined
        places[step], moves[step] = len(values), bits
        steps.append((len(values), bits, equation.program, inputs))
        values.append(value)
    if not numbers:
        return (values[-1],), 0
    found: list[Number | None] = []
    for place, number in enumerate(numbers):
        changed = values.copy()
        changed[place] = number + 1
        if place in percents:
            changed[percents[place]] = divide(number + 1, 100)
        value = values[-1]
        for target, bits, program, inputs in steps:
            if bits >> place & 1:
                if len(inputs) == 2 and len(program) == 3:  # as most are
                    value = calculate(program[2], changed[inputs[0]], changed[inputs[1]])
                else:
                    value = evaluate(program, [changed[place] for place in inputs])
                if value is None or _huge(value):
                    value = None
                    break
                changed[target] = value
        found.append(value)
    return tuple(found), sum(value is not None and value != values[-1] for value in found)


def _huge(value: Number) -> bool:
    if type(value) is int:
        return value.bit_length() > MAX_BITS
    return value.numerator.bit_length() > MAX_BITS or value.denominator.bit_length() > MAX_BITS


def _overlap(a: Counter[Number], b: Counter[Number]) -> float:
    """2 |A and B| / (|A| + |B|) of two multisets; 0 when both are empty."""
    if a is b:
        return 1.0 if a else 0.0
    total = sum(a.values()) + sum(b.values())
    if not total:
        return 0.0
    shared = 0
    for value in a.keys() & b.keys():
        shared += min(a[value], b[value])
    return 2 * shared / total


def _agreed(a: tuple[Number | None, ...], b: tuple[Number | None, ...]) -> int:
    if a == b:
        return len(a) - a.count(None)
    agreed = 0
    for x, y in zip(a, b, strict=True):
        if x is not None and x == y:
            agreed += 1
    return agreed
