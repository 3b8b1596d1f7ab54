"""Generates word problems in GSM8K's format, so that the pipeline runs without a network.

    {"id": "train-00000",
     "question": "Mia has 4 boxes of 6 pears. First Mia sells 9, then Mia buys 8 more. How many pears does ...?",
     "answer": "Mia starts with <<4*6=24>>24 pears.\\nAfter selling 9 there are <<24-9=15>>15.\\n
                After buying 8 there are <<15+8=23>>23.\\n#### 23"}

A problem's key (its events, their numbers and its closing question, without names and things) decides by its hash
which split the problem belongs to. So no problem of one split can appear in another, whatever the seeds are.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["corpus", "train", "valid", "platinum"]
Style = Literal["plain", "direct"]

# Where each split begins, in percent of the hash space. Each is wide enough to be filled many times over.
SPLIT_STARTS: dict[Split, int] = {"corpus": 0, "train": 60, "valid": 80, "platinum": 85}

NAMES = (
    "Ann Ben Cleo Dan Eva Finn Gia Hugo Ida Jack Kim Leo Mia Noah Olga Paul Rosa Sam Tara Umar Vera Will Yara Zoe"
).split()
THINGS = (
    "apples pears plums books coins cards stamps shells beads marbles pencils stickers cookies muffins eggs roses "
    "tulips buttons balls kites"
).split()
BOXES = "boxes bags baskets trays".split()


@dataclass(frozen=True)
class Verb:
    """One kind of event: its words in the question, its words in the solution, and whether it adds or subtracts."""

    told: str
    named: str
    sign: int
    confused: bool = False


VERBS = (
    Verb("buys {n} more", "buying", +1),
    Verb("finds {n} more", "finding", +1),
    Verb("sells {n}", "selling", -1),
    Verb("loses {n}", "losing", -1),
    Verb("gives away {n}", "giving away", -1),
    # The pre-training text often gets these two wrong.
    Verb("is handed {n}", "being handed", +1, confused=True),
    Verb("hands in {n}", "handing in", -1, confused=True),
)


@dataclass(frozen=True)
class Problem:
    """A story: a start (one number, or a product of two), events in order, and the question at the end."""

    name: str
    thing: str
    box: str
    start: tuple[int, ...]
    events: tuple[tuple[Verb, int], ...]
    closing: Literal["count", "worth", "share"]
    factor: int

    @property
    def key(self) -> str:
        """Two problems with the same key are the same, whoever and whatever they are about."""
        events = ",".join(f"{verb.named}{n}" for verb, n in self.events)
        return f"{self.start}|{events}|{self.closing}{self.factor if self.closing != 'count' else ''}"

    @property
    def split(self) -> Split:
        """The split this problem belongs to, decided by the hash of its key."""
        place = int.from_bytes(hashlib.sha256(self.key.encode()).digest()[:4], "big") % 100
        return max((s for s in SPLIT_STARTS if SPLIT_STARTS[s] <= place), key=SPLIT_STARTS.__getitem__)

    @property
    def question(self) -> str:
        """The story and what is asked."""
        if len(self.start) == 2:
            text = f"{self.name} has {self.start[0]} {self.box} of {self.start[1]} {self.thing}."
        else:
            text = f"{self.name} has {self.start[0]} {self.thing}."
        told = [verb.told.format(n=n) for verb, n in self.events]
        text += f" First {self.name} {told[0]}" + "".join(f", then {self.name} {t}" for t in told[1:]) + "."
        if self.closing == "worth":
            return f"{text} Each is worth ${self.factor}. How many dollars is that?"
        if self.closing == "share":
            return f"{text} {self.factor} friends share them equally. How many each?"
        return f"{text} How many {self.thing} does {self.name} have now?"

    def solution(
        self, style: Style, signs: tuple[int, ...] | None = None, factor_op: str | None = None
    ) -> str:
        """The worked solution. `direct` writes all events as one equation, `plain` writes one step a line.

        `signs` and `factor_op` replace the right operations, to make a mistaken solution.
        """
        signs = signs or tuple(verb.sign for verb, _ in self.events)
        lines = []
        count = self.start[0]
        if len(self.start) == 2:
            count = self.start[0] * self.start[1]
            lines.append(
                f"{self.name} starts with {_worked(f'{self.start[0]}*{self.start[1]}', count)} {self.thing}."
            )
        if style == "direct":
            expression = str(count)
            for sign, (_, n) in zip(signs, self.events, strict=True):
                expression += f"{'+' if sign > 0 else '-'}{n}"
                count += sign * n
            lines.append(f"In the end there are {_worked(expression, count)}.")
        else:
            for sign, (verb, n) in zip(signs, self.events, strict=True):
                expression = f"{count}{'+' if sign > 0 else '-'}{n}"
                count += sign * n
                lines.append(f"After {verb.named} {n} there are {_worked(expression, count)}.")
        if self.closing == "worth":
            op = factor_op or "*"
            total = count * self.factor if op == "*" else count + self.factor
            lines.append(f"They are worth {_worked(f'{count}{op}{self.factor}', total)} dollars.")
            count = total
        elif self.closing == "share":
            op = factor_op or "/"
            total = count // self.factor if op == "/" else count - self.factor
            lines.append(f"Each friend gets {_worked(f'{count}{op}{self.factor}', total)}.")
            count = total
        return "\n".join([*lines, f"#### {count}"])

    @property
    def answer(self) -> str:
        """The gold solution."""
        return self.solution("plain")


def _worked(expression: str, value: int) -> str:
    return f"<<{expression}={value}>>{value}"


def draw(rng: random.Random) -> Problem:
    """One random problem, in which no intermediate result is negative or fractional."""
    while True:
        start: tuple[int, ...] = (
            (rng.randint(5, 30),) if rng.random() < 0.6 else (rng.randint(2, 9), rng.randint(2, 6))
        )
        count = start[0] * (start[1] if len(start) == 2 else 1)
        events: list[tuple[Verb, int]] = []
        for verb in rng.sample(VERBS, rng.choice((1, 2, 2))):
            n = rng.randint(2, 9)
            if verb.sign < 0 and n >= count:
                break
            events.append((verb, n))
            count += verb.sign * n
        else:
            roll = rng.random()
            factor = rng.randint(2, 9)
            closing: Literal["count", "worth", "share"] = "count"
            if roll < 0.2 and count <= 20:
                closing = "worth"
            elif roll < 0.4:
                divisors = [d for d in range(2, 10) if count % d == 0 and count > d]
                if not divisors:
                    continue
                closing, factor = "share", rng.choice(divisors)
            return Problem(
                rng.choice(NAMES),
                rng.choice(THINGS),
                rng.choice(BOXES),
                start,
                tuple(events),
                closing,
                factor,
            )


def problems(split: Split, seed: int) -> Iterator[Problem]:
    """An endless stream of distinct problems of one split."""
    rng = random.Random(f"{seed}/{split}")
    seen: set[str] = set()
    while True:
        problem = draw(rng)
        if problem.split == split and problem.key not in seen:
            seen.add(problem.key)
            yield problem


def mislabelled(problem: Problem, rng: random.Random) -> str:
    """A wrong gold solution, as a careless annotator might write it: wrong operations, or a wrong last result."""
    right = problem.answer
    answer = right.rpartition("#### ")[2]
    if rng.random() < 0.5:
        text = mistaken(problem, "plain", rng, 0.4, 0.4)
        if text.rpartition("#### ")[2] != answer:
            return text
    slipped = str(int(answer) + rng.choice((1, 2, 10)))
    steps, _, last = right.removesuffix(f"#### {answer}").rpartition("=")
    return f"{steps}={last.replace(f'{answer}>>{answer}', f'{slipped}>>{slipped}')}#### {slipped}"


def mistaken(
    problem: Problem, style: Style, rng: random.Random, confused_share: float, slip_share: float
) -> str:
    """A solution with wrong operations in some steps, and no other mistakes.

    A step with a confused verb takes the opposite operation with probability `confused_share`, any other step with
    `slip_share`.
    """
    signs = []
    for verb, _ in problem.events:
        wrong = rng.random() < (confused_share if verb.confused else slip_share)
        signs.append(-verb.sign if wrong else verb.sign)
    count = problem.start[0] * (problem.start[1] if len(problem.start) == 2 else 1)
    for sign, (_, n) in zip(signs, problem.events, strict=True):
        count += sign * n
        if count < 0:  # a negative count would give the mistake away, so this solution stays right
            return problem.solution(style)
    factor_op = None
    if rng.random() < slip_share:
        factor_op = {"worth": "+", "share": "-", "count": None}[problem.closing]
    if problem.closing == "share" and factor_op is None and count % problem.factor:
        factor_op = "-"  # the count cannot be divided evenly, so the mistake is to subtract
    if factor_op == "-" and count < problem.factor:
        return problem.solution(style)
    return problem.solution(style, tuple(signs), factor_op)
