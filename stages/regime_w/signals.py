"""The coherence signals of Regime W: how far the trajectories of one question agree, and why.

    score_group(question, [{"text": ..., "answer": "10"}, ...]).s_wm   ->  [0.644444, 0.644444, 0.622222, 0.0]

s_end: the same final answer. s_path: the same intermediate values. s_cf: the same answer when a number of the
question changes. Everything depends on the texts and answers of one question only, never on the gold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import fsum
from typing import Any, Literal

from stages.regime_w.solution import (
    MAX_BITS,
    Equation,
    Number,
    Solution,
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
    number m grows by 1, None when it is undefined. Without numbers in the question there is one counterfactual.
    """

    answer: str | None
    solution: Solution
    links: list[list[int]]
    carrier: int | None
    counterfactuals: tuple[Number | None, ...]
    values: Counter[Number]


@dataclass(slots=True, frozen=True)
class GroupAnalysis:
    """The numbers of a question, and the reasoning of each trajectory: one object for equal texts and answers."""

    numbers: list[Number]
    reasonings: list[Reasoning]

    def score(self, weights: Sequence[float] = DEFAULT_WEIGHTS) -> GroupScore:
        """The four signals. All are 0 when there is only one trajectory."""
        distinct = list({id(reasoning): reasoning for reasoning in self.reasonings}.values())
        copies = Counter(id(reasoning) for reasoning in self.reasonings)
        counts = [copies[id(reasoning)] for reasoning in distinct]
        size, others = len(distinct), len(self.reasonings) - 1
        end = [0] * size
        path: list[list[float]] = [[] for _ in range(size)]
        cf = [0] * size
        for i in range(size):
            for j in range(i, size):
                a, b = distinct[i], distinct[j]
                same_end = a.answer is not None and a.answer == b.answer
                overlap = _overlap(a.values, b.values)
                agreed = _agreed(a.counterfactuals, b.counterfactuals)
                pairs = ((i, counts[i] - 1),) if i == j else ((i, counts[j]), (j, counts[i]))
                for one, times in pairs:
                    end[one] += times * same_end
                    path[one].append(times * overlap)
                    cf[one] += times * agreed
        interventions = max(1, len(self.numbers))
        total = weights[0] + weights[1] + weights[2]
        rows: dict[int, tuple[float, float, float, float]] = {}
        for i, reasoning in enumerate(distinct):
            if others > 0:
                s_end = end[i] / others
                s_path = min(1.0, fsum(path[i]) / others)
                s_cf = cf[i] / (interventions * others)
            else:
                s_end = s_path = s_cf = 0.0
            s_wm = (weights[0] * s_end + weights[1] * s_path + weights[2] * s_cf) / total
            rows[id(reasoning)] = (s_end, s_path, s_cf, s_wm)
        columns = [[rows[id(reasoning)][column] for reasoning in self.reasonings] for column in range(4)]
        return GroupScore(*columns)


def score_group(
    question: str, trajectories: Sequence[Mapping[str, Any]], weights: Sequence[float] = DEFAULT_WEIGHTS
) -> GroupScore:
    """The signals of one question's trajectories; each has `text` (the solution only) and `answer` (or None).

    `weights` are those of s_end, s_path and s_cf in s_wm. This is the function a scorer file must offer.
    """
    return analyse_group(question, trajectories).score(weights)


def analyse_group(question: str, trajectories: Sequence[Mapping[str, Any]]) -> GroupAnalysis:
    """Read each distinct text of a question once."""
    numbers = question_numbers(question)
    places = {number: index for index, number in enumerate(numbers)}
    reasonings: dict[tuple[str, str | None], Reasoning] = {}
    ordered = []
    for trajectory in trajectories:
        key = (trajectory["text"], trajectory["answer"])
        reasoning = reasonings.get(key)
        if reasoning is None:
            reasoning = reasonings[key] = read_reasoning(numbers, places, *key)
        ordered.append(reasoning)
    return GroupAnalysis(numbers, ordered)


def read_reasoning(
    numbers: list[Number], places: Mapping[Number, int], text: str, answer: str | None
) -> Reasoning:
    """Equations, links and counterfactuals of one text. `places` gives each question number's index."""
    solution = read_solution(text)
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
    undefined = (None,) * max(1, len(numbers))
    found = undefined if carrier is None else _rerun(equations, links, carrier, numbers)
    return Reasoning(answer, solution, links, carrier, found, Counter(e.value for e in equations))


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
) -> tuple[Number | None, ...]:
    """The carrier's value with each question number grown by 1; all None when a step does not hold."""
    undefined = (None,) * max(1, len(numbers))
    waiting, needed = [carrier], {carrier}
    while waiting:
        step = waiting.pop()
        if not equations[step].holds:
            return undefined
        for source in links[step]:
            if source >= 0 and source not in needed:
                needed.add(source)
                waiting.append(source)
    order = sorted(needed)
    base: dict[int, Number] = {}
    moves: dict[int, int] = {}  # which question numbers an equation depends on, as bits
    for step in order:
        bits = 0
        for source in links[step]:
            if source >= 0:
                bits |= moves[source]
            elif source != CONSTANT:
                bits |= 1 << (-2 - source)
        moves[step] = bits
        value = _value(equations[step], links[step], base, CONSTANT, 0)
        if value is None:
            return undefined
        base[step] = value
    if not numbers:
        return (base[carrier],)
    found: list[Number | None] = []
    for place, number in enumerate(numbers):
        bit = 1 << place
        if not moves[carrier] & bit:
            found.append(base[carrier])
            continue
        values = dict(base)
        value = None
        for step in order:
            if moves[step] & bit:
                value = _value(equations[step], links[step], values, -2 - place, number + 1)
                if value is None:
                    break
                values[step] = value
        found.append(value)
    return tuple(found)


def _value(
    equation: Equation, sources: list[int], values: Mapping[int, Number], changed: int, new: Number
) -> Number | None:
    """An equation's value with linked operands re-run and question number `changed` set to `new`."""
    inputs: list[Number] = []
    for operand, source in zip(equation.operands, sources, strict=True):
        if source >= 0:
            inputs.append(values[source])
        elif source == changed and source != CONSTANT:
            inputs.append(normal(Fraction(new) / 100) if operand.percent else new)
        else:
            inputs.append(operand.value if operand.percent else operand.printed)
    value = evaluate(equation.program, inputs)
    if value is None or value.numerator.bit_length() > MAX_BITS or value.denominator.bit_length() > MAX_BITS:
        return None
    return value


def _overlap(a: Counter[Number], b: Counter[Number]) -> float:
    """2 |A and B| / (|A| + |B|) of two multisets; 0 when both are empty."""
    total = a.total() + b.total()
    if not total:
        return 0.0
    if a is b:
        return 1.0
    return 2 * sum(min(count, b[value]) for value, count in a.items() if value in b) / total


def _agreed(a: tuple[Number | None, ...], b: tuple[Number | None, ...]) -> int:
    return sum(x is not None and x == y for x, y in zip(a, b, strict=True))
