"""Generates word problems in GSM8K's format, so that the pipeline runs without a network.

    {"id": "train-00000",
     "question": "Mia has 4 boxes of 6 pears. Leo has 9 pears. First Mia sells 5, then Mia buys 8 more. How many ...?",
     "answer": "Mia starts with <<4*6=24>>24 pears.\\nAfter selling 5 there are <<24-5=19>>19.\\n
                After buying 8 there are <<19+8=27>>27.\\n#### 27"}

As in real problems, there are several right ways to a solution (`Way`), numbers that are not needed (Leo's), and
coincidences: sometimes Leo has 24, and who takes his number for Mia's start is right by luck.

A problem's key (its numbers, its events and its closing question, without names and things) decides by its hash which
split the problem belongs to. So no problem of one split can appear in another, whatever the seeds are.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Split = Literal["corpus", "train", "valid", "platinum"]

# A style is how a prompt asks; each has its own mixture of ways. What a problem does not allow becomes `steps`.
#   steps     one event after the other          <<24-5=19>>19, <<19+8=27>>27
#   swapped   the second event first             <<24+8=32>>32, <<32-5=27>>27
#   changes   both events together, then applied <<8-5=3>>3, <<24+3=27>>27
#   short     the events as one equation         <<24-5+8=27>>27
#   adding    products as sums                   <<6+6+6+6=24>>24
Way = Literal["steps", "swapped", "changes", "short", "adding"]
Style = Literal["plain", "changes", "short", "adding"]
WAYS: dict[Style, dict[Way, float]] = {
    "plain": {"steps": 0.4, "swapped": 0.2, "changes": 0.2, "adding": 0.2},
    "changes": {"changes": 1.0},
    "short": {"short": 1.0},
    "adding": {"adding": 1.0},
}
GOLD_WAYS: dict[Way, float] = {"steps": 0.6, "swapped": 0.2, "changes": 0.2}

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
MOST = 60  # the highest count on the way
MOST_WORTH = 20  # the highest count that is sold
MOST_ADDED = 4  # the largest factor that is written as a sum
COINCIDENCE = 0.4  # how often the other person's number makes a wrong way right, where it can


@dataclass(frozen=True)
class Verb:
    """One kind of event: its words in the question and in the solution, and its operation."""

    told: str
    named: str
    operation: Literal["+", "-", "/"]
    confused: bool = False


HALF = Verb("gives half away", "giving half away", "/")
VERBS = (
    Verb("buys {n} more", "buying", "+"),
    Verb("finds {n} more", "finding", "+"),
    Verb("sells {n}", "selling", "-"),
    Verb("loses {n}", "losing", "-"),
    Verb("gives away {n}", "giving away", "-"),
    # The pre-training text often gets these two wrong.
    Verb("is handed {n}", "being handed", "+", confused=True),
    Verb("hands in {n}", "handing in", "-", confused=True),
)
OPPOSITE = {"+": "-", "-": "+"}
Step = tuple[str, int]  # an operation and its operand


def apply(count: int, step: Step) -> int | None:
    """The count after a step; None where it would be negative, zero, fractional or too large for these problems."""
    operation, n = step
    if operation == "/":
        result, rest = divmod(count, n)
        return None if rest or not result else result
    result = {"+": count + n, "-": count - n, "*": count * n}[operation]
    return result if 0 < result <= (MOST_WORTH * 9 if operation == "*" else MOST) else None


@dataclass(frozen=True)
class Problem:
    """A story: a start (one number, or a product of two), perhaps another person's number, events, a question."""

    name: str
    thing: str
    box: str
    start: tuple[int, ...]
    other: tuple[str, int] | None
    events: tuple[tuple[Verb, int], ...]  # the number is 2 for HALF
    closing: Literal["count", "worth", "share"]
    factor: int

    @property
    def key(self) -> str:
        """Two problems with the same key are the same, whoever and whatever they are about."""
        events = ",".join(f"{verb.named}{n}" for verb, n in self.events)
        other = self.other[1] if self.other else ""
        return f"{self.start}|{other}|{events}|{self.closing}{self.factor if self.closing != 'count' else ''}"

    @property
    def split(self) -> Split:
        """The split this problem belongs to, decided by the hash of its key."""
        place = int.from_bytes(hashlib.sha256(self.key.encode()).digest()[:4], "big") % 100
        return max((s for s in SPLIT_STARTS if SPLIT_STARTS[s] <= place), key=SPLIT_STARTS.__getitem__)

    @property
    def question(self) -> str:
        """The story and what is asked."""
        start = f"{self.start[0]} {self.box} of {self.start[1]}" if len(self.start) == 2 else self.start[0]
        text = f"{self.name} has {start} {self.thing}."
        if self.other:
            text += f" {self.other[0]} has {self.other[1]} {self.thing}."
        told = [verb.told.format(n=n) for verb, n in self.events]
        text += f" First {self.name} {told[0]}" + "".join(f", then {self.name} {t}" for t in told[1:]) + "."
        if self.closing == "worth":
            return f"{text} Each is worth ${self.factor}. How many dollars is that?"
        if self.closing == "share":
            return f"{text} {self.factor} friends share them equally. How many each?"
        return f"{text} How many {self.thing} does {self.name} have now?"

    @property
    def first(self) -> int:
        """The count at the start."""
        return self.start[0] * (self.start[1] if len(self.start) == 2 else 1)

    @property
    def changes(self) -> tuple[Step, ...]:
        """The right step of each event."""
        return tuple((verb.operation, n) for verb, n in self.events)

    @property
    def last(self) -> Step | None:
        """The right step of the closing question; None where the count itself is asked for."""
        return {"count": None, "worth": ("*", self.factor), "share": ("/", self.factor)}[self.closing]

    @property
    def result(self) -> int | None:
        """The right answer; None when a count on the way is not a positive whole number in range."""
        return _run(self.first, (*self.changes, *([self.last] if self.last else [])))

    def solution(self, way: Way, mistakes: Mistakes | None = None) -> str:
        """The worked solution in one of the ways, right or with mistakes."""
        made = mistakes or Mistakes(self.changes, self.last)
        lines, count = [], self.first
        if made.start is not None:
            count = made.start
            lines.append(f"{self.name} starts with {count} {self.thing}.")
        elif len(self.start) == 2:
            terms = f"{self.start[0]}*{self.start[1]}"
            if way == "adding" and self.start[0] <= MOST_ADDED:
                terms = "+".join([str(self.start[1])] * self.start[0])
            lines.append(f"{self.name} starts with {_worked(terms, count)} {self.thing}.")
        if made.added is not None:
            total = count + made.added
            lines.append(f"Together there are {_worked(f'{count}+{made.added}', total)}.")
            count = total
        more, count = _tell_events(way, count, made.changes, [verb.named for verb, _ in self.events])
        lines += more
        if made.last:
            (operation, n), before = made.last, count
            count = _must(apply(before, made.last))
            words = "They are worth {} dollars." if self.closing == "worth" else "Each friend gets {}."
            terms = f"{before}{operation}{n}"
            if way == "adding" and operation == "*" and n <= MOST_ADDED:
                terms = "+".join([str(before)] * n)
            lines.append(words.format(_worked(terms, count)))
        return "\n".join([*lines, f"#### {count}"])

    def gold(self, rng: random.Random) -> str:
        """A right and sound solution, in one of several ways."""
        return self.solution(_pick(GOLD_WAYS, rng))

    def changed(self, rng: random.Random) -> Problem | None:
        """The problem with one number changed: its twin, in the same split. None where no change will do."""
        return next(self.twins(rng), None)

    def twins(self, rng: random.Random) -> Iterator[Problem]:
        """All its twins, in random order: the problem with one number changed, where the answer moves."""
        changes = self.candidates()
        rng.shuffle(changes)
        return (one for one in changes if one.result not in (None, self.result) and one.split == self.split)

    def candidates(self) -> list[Problem]:
        """The problem with one number changed, whatever comes of it: a needed one that stands once in the question."""
        printed = Counter(re.findall(r"\d+", self.question))
        changes: list[Problem] = []
        for place, number in enumerate(self.start):
            most = 30 if len(self.start) == 1 else (9, 6)[place]
            values = [n for n in range(2, most + 1) if n != number and printed[str(number)] == 1]
            changes += [
                replace(self, start=(*self.start[:place], n, *self.start[place + 1 :])) for n in values
            ]
        for place, (verb, number) in enumerate(self.events):
            values = [
                n for n in range(2, 10) if n != number and printed[str(number)] == 1 and verb is not HALF
            ]
            rest = self.events[:place], self.events[place + 1 :]
            changes += [replace(self, events=(*rest[0], (verb, n), *rest[1])) for n in values]
        if self.last and printed[str(self.factor)] == 1:
            changes += [replace(self, factor=n) for n in range(2, 10) if n != self.factor]
        return changes


@dataclass(frozen=True)
class Mistakes:
    """What a mistaken solution does instead: the steps it takes, and what it makes of the other person's number."""

    changes: tuple[Step, ...]
    last: Step | None
    start: int | None = None  # taken for the start
    added: int | None = None  # added to the start


def _run(count: int | None, steps: Sequence[Step]) -> int | None:
    for step in steps:
        count = None if count is None else apply(count, step)
    return count


def _must(count: int | None) -> int:
    assert count is not None, "the steps were checked before they are told"
    return count


def _tell_events(way: Way, count: int, changes: tuple[Step, ...], named: list[str]) -> tuple[list[str], int]:
    """The lines of the events, and the count after them."""
    told = [
        name if name == HALF.named else f"{name} {n}" for name, (_, n) in zip(named, changes, strict=True)
    ]
    sums = all(operation in "+-" for operation, _ in changes)
    if len(changes) == 2 and sums and way == "short":
        terms = f"{count}" + "".join(f"{operation}{n}" for operation, n in changes)
        total = _must(_run(count, changes))
        return [f"In the end there are {_worked(terms, total)}."], total
    if len(changes) == 2 and sums and way == "changes" and (line := _joined(count, changes)):
        return line
    order = [0, 1] if len(changes) == 2 else [0]
    if len(changes) == 2 and sums and way == "swapped" and _run(count, changes[::-1]) is not None:
        order = [1, 0]
    lines = []
    for place in order:
        total = _must(apply(count, changes[place]))
        terms = f"{count}{changes[place][0]}{changes[place][1]}"
        lines.append(f"After {told[place]} there are {_worked(terms, total)}.")
        count = total
    return lines, count


def _joined(count: int, changes: tuple[Step, ...]) -> tuple[list[str], int] | None:
    """Both changes as one, then applied; None where they cancel."""
    net = sum(n if operation == "+" else -n for operation, n in changes)
    if not net:
        return None
    (one, a), (other, b) = changes
    high, low = max(a, b), min(a, b)
    terms = f"{a}+{b}" if one == other else f"{high}-{low}"
    sign, size = ("+", net) if net > 0 else ("-", -net)
    total = count + net
    return [
        f"Together that is {_worked(terms, size)} {'more' if net > 0 else 'less'}.",
        f"So there are {_worked(f'{count}{sign}{size}', total)}.",
    ], total


def _worked(expression: str, value: int) -> str:
    return f"<<{expression}={value}>>{value}"


def _pick(ways: dict[Way, float], rng: random.Random) -> Way:
    return rng.choices(list(ways), list(ways.values()))[0]


def draw(rng: random.Random, between: Sequence[int] = ()) -> Problem:
    """One random problem of two to four steps, in which every count is a positive whole number.

    With `between`, the story starts with one number in this range.
    """
    while True:
        product = not between and rng.random() < 0.5
        single = between or (5, 30)
        start = (rng.randint(2, 9), rng.randint(2, 6)) if product else (rng.randint(*single),)
        events = [(verb, rng.randint(2, 9)) for verb in rng.sample(VERBS, rng.choice((1, 2, 2)))]
        if rng.random() < 0.3:
            events[rng.randrange(len(events))] = (HALF, 2)
        roll = rng.random()
        closing: Literal["count", "worth", "share"] = "count"
        if roll < 0.45:
            closing = "worth" if roll < 0.2 else "share"
        name, friend = rng.sample(NAMES, 2)
        problem = Problem(
            name, rng.choice(THINGS), rng.choice(BOXES), start, None, tuple(events), closing, rng.randint(2, 9)
        )  # fmt: skip
        steps = product + len(events) + (closing != "count")
        before_last = _run(problem.first, problem.changes)
        if not 2 <= steps <= 4 or problem.result is None or before_last is None:
            continue
        if closing == "worth" and before_last > MOST_WORTH:
            continue
        if rng.random() < 0.5:
            problem = replace(problem, other=(friend, _others(problem, rng)))
        return problem


def _others(problem: Problem, rng: random.Random) -> int:
    """The other person's number: sometimes the one that makes a wrong way right."""
    if rng.random() < COINCIDENCE:
        if len(problem.start) == 2:
            return problem.first
        count = problem.first
        for step in problem.changes:
            after = _must(apply(count, step))
            if step[0] == "/":
                return after
            count = after
    return rng.randint(2, 30)


def problems(split: Split, seed: int, between: Sequence[int] = ()) -> Iterator[Problem]:
    """An endless stream of distinct problems of one split; `between` as in `draw`."""
    rng = random.Random(f"{seed}/{split}")
    seen: set[str] = set()
    while True:
        problem = draw(rng, between)
        if problem.split == split and problem.key not in seen:
            seen.add(problem.key)
            yield problem


def labelled(split: Split, seed: int, wrong_labels: float) -> Iterator[tuple[Problem, str, bool]]:
    """The problems of a split, each with its gold solution, a share of them wrong, and whether it is."""
    for place, problem in enumerate(problems(split, seed)):
        rng = random.Random(f"{seed}/{split}/{place}")
        gold = problem.gold(rng)
        planted = rng.random() < wrong_labels
        yield problem, mislabelled(problem, gold, rng) if planted else gold, planted


def mislabelled(problem: Problem, gold: str, rng: random.Random) -> str:
    """A wrong gold solution, as a careless annotator might write it: wrong operations, or a wrong last result."""
    answer = gold.rpartition("#### ")[2]
    if rng.random() < 0.5:
        text = mistaken(problem, "plain", rng, 0.4, 0.4, 0.4)
        if text.rpartition("#### ")[2] != answer:
            return text
    slipped = str(int(answer) + rng.choice((1, 2, 10)))
    steps, _, last = gold.removesuffix(f"#### {answer}").rpartition("=")
    return f"{steps}={last.replace(f'{answer}>>{answer}', f'{slipped}>>{slipped}')}#### {slipped}"


def mistaken(
    problem: Problem,
    style: Style,
    rng: random.Random,
    confused_share: float,
    other_share: float,
    slip_share: float,
) -> str:
    """A solution in one of the style's ways, perhaps with wrong steps, but with no wrong sums.

    A step with a confused verb takes the opposite operation with probability `confused_share`, any other step a wrong
    one with `slip_share`. Where another person's number is told, it is used with probability `other_share`: taken for a
    start that has to be multiplied out, else given away instead of half, else added to the start.
    """
    way = _pick(WAYS[style], rng)
    start, added, changes = None, None, []
    others = problem.other[1] if problem.other and rng.random() < other_share else None
    if others and len(problem.start) == 2:
        start, others = others, None
    for verb, n in problem.events:
        operation: str = verb.operation
        if operation == "/":
            if others:
                operation, n, others = "-", others, None
            elif rng.random() < slip_share:
                operation = "-"
        elif rng.random() < (confused_share if verb.confused else slip_share):
            operation = OPPOSITE[operation]
        changes.append((operation, n))
    added = others
    count = (problem.first if start is None else start) + (added or 0)
    before_last, last = _run(count, changes), problem.last
    if last and rng.random() < slip_share:
        last = ("+" if problem.closing == "worth" else "-", problem.factor)
    if last and before_last is not None and apply(before_last, last) is None and last[0] == "/":
        last = ("-", problem.factor)  # the count cannot be divided evenly, so the mistake is to subtract
    made = Mistakes(tuple(changes), last, start, added)
    # A count that is negative or too large would give the mistake away, so such a solution stays right.
    if before_last is None or (last and apply(before_last, last) is None):
        return problem.solution(way)
    return problem.solution(way, made)
