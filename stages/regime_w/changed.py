"""Changed questions: a question's twin has one number changed, and a gold that follows from the gold solution.

    question  "Ann has 3 bags of 4 apples and eats 2. How many are left?"   <<3*4=12>>12 <<12-2=10>>10 #### 10
    twin      "Ann has 5 bags of 4 apples and eats 2. How many are left?"   5*4=20, 20-2=18            gold 18

The gold's equations are run again with the new number. A twin is made only where nothing about that is a guess.
docs/changed-questions.md explains the rules and says how often they fail. It is here and not in `stages/text` because
it reads solutions as Regime W does.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

from stages.regime_w.question import QuestionNumber, read_question
from stages.regime_w.solution import MAX_BITS, Number, divide, evaluate, normal, read_solution
from stages.text.answers import canonical

# Why a question has no twin: what is wrong with its solution, then what is wrong with its numbers. Of several numbers
# the reason furthest down counts, because that number came closest.
REASONS = {
    "deal": "who buys some gets some free, so that part of a deal may have another price",
    "unread": "an equation of the solution cannot be read, or stands beside annotations, or there are too many",
    "no_carrier": "the solution's last equation does not carry the answer",
    "bare": "a needed equation is a single number, so its calculation is not known",
    "inexact": "a needed equation does not hold, or only when rounded",
    "unexplained": "an operand is no earlier result, and no number or word of the question",
    "unneeded": "the answer needs no digit number of the question",
    "not_plain": "the number is below 2, or part of a fraction, a time, a range, an ordinal or a name",
    "twice": "the number, or a word that could mean it, stands in the question again",
    "summed": "the number makes a sum with one that the solution does not use",
    "two_sources": "an operand could come from two places that part when the number changes",
    "no_value": "no new value keeps whole what is whole, positive what is positive, and larger what is larger",
}
Change = Literal["one", "all"]
MAX_STEPS = 50  # equations of a solution; with the limits of a question's numbers this bounds the work
SMALL = 12  # up to here, two equal operands are often two different things
TRIES = 24  # new values tried of one number
_DEAL = re.compile(r"\bbuy\b[^.?!]{0,200}\bget\b[^.?!]{0,200}\b(?:free|off)\b", re.IGNORECASE)
_ARTICLE = re.compile(r"\b[Aa]n?\s\$?\Z")


class Refused(Exception):
    """A twin, or every twin of a question, is refused; the argument is one of `REASONS`."""


@dataclass(slots=True, frozen=True)
class Twin:
    """A changed question with its gold (canonical): `old` became `new` at `start`, digit number `place`."""

    question: str
    gold: str
    place: int
    start: int
    old: str
    new: str


@dataclass
class ChangeCounts:
    """How many questions were read, how many have a twin, how many twins there are, and why the others have none."""

    questions: int = 0
    with_twin: int = 0
    twins: int = 0
    refused: Counter[str] = field(default_factory=Counter)

    def metrics(self) -> dict[str, int | dict[str, int]]:
        """The counts, and every reason in the order of `REASONS`."""
        refused = {reason: self.refused[reason] for reason in REASONS}
        return {
            "questions": self.questions,
            "with_twin": self.with_twin,
            "twins": self.twins,
            "refused": refused,
        }


def changed_rows(
    rows: Iterable[Mapping[str, Any]], change: Change, seed: int, counts: ChangeCounts
) -> Iterator[dict[str, Any]]:
    """The twins of rows with `id`, `question`, `solution` and `gold`, as data/gsm8k/changed.jsonl holds them.

    `change` is `one` twin a question, its number drawn by `seed`, or `all`, one for each number. A twin depends on the
    seed and on its own question only. `counts` is filled on the way.
    """
    rank = {reason: place for place, reason in enumerate(REASONS)}
    for row in rows:
        counts.questions += 1
        made, reasons = 0, ["unneeded"]
        try:
            changer = Changer(row["question"], row["solution"], row["gold"])
            for twin in changer.twins(random.Random(f"{seed}/{row['id']}")):
                if isinstance(twin, str):
                    reasons.append(twin)
                    continue
                made += 1
                yield {
                    "id": f"{row['id']}~{twin.place + 1}",
                    "of": row["id"],
                    "question": twin.question,
                    "gold": twin.gold,
                    "change": {"start": twin.start, "from": twin.old, "to": twin.new},
                }
                if change == "one":
                    break
        except Refused as refused:
            reasons = [str(refused)]
        counts.twins += made
        if made:
            counts.with_twin += 1
        else:
            counts.refused[max(reasons, key=rank.__getitem__)] += 1


@dataclass(slots=True, frozen=True)
class _Sources:
    """Where an operand may come from: earlier equations, numbers of the question, or a word, which never moves.

    The bool beside a place: the operand is a hundredth of what stands there.
    """

    equations: list[tuple[int, bool]]
    numbers: list[tuple[int, bool]]
    word: bool


class Changer:
    """A question and its gold solution, understood. Raises Refused where that fails; `gold` is the canonical answer."""

    def __init__(self, question: str, solution: str, gold: str) -> None:
        if _DEAL.search(question):
            raise Refused("deal")
        read = read_solution(solution)
        if read.skipped or len(read.equations) > MAX_STEPS or _hides_equations(solution):
            raise Refused("unread")
        if not read.equations or canonical(read.equations[-1].value) != gold:
            raise Refused("no_carrier")
        self.text = question
        self.equations = read.equations
        self.question = read_question(question)
        self.sources = self._all_sources()
        self.needed = self._needed()
        self.used = {operand.printed for step in self.needed for operand in self.equations[step].operands}
        self.values = [number.value for number in self.question.numbers]
        self.taken = [
            Counter(n for one in self.sources[step] for n, _ in one.numbers) for step in self.needed
        ]
        self.refusals = [self._refusal(place) for place in range(len(self.values))]

    # ---- understanding -------------------------------------------------------------------------------

    def _all_sources(self) -> list[list[_Sources]]:
        """For each equation, where each of its operands may come from."""
        numbers: dict[Number, list[tuple[int, bool]]] = {}
        for place, number in enumerate(self.question.numbers):
            numbers.setdefault(number.value, []).append((place, False))
            if number.hundredths:
                numbers.setdefault(divide(number.value, 100), []).append((place, True))
        results: dict[Number, list[tuple[int, bool]]] = {}
        found = []
        for place, equation in enumerate(self.equations):
            row = []
            for operand in equation.operands:
                earlier = results.get(operand.value, [])
                if operand.percent:
                    earlier = earlier + [(step, True) for step, _ in results.get(operand.printed, [])]
                word = operand.printed in self.question.words
                row.append(_Sources(list(earlier), numbers.get(operand.value, []), word))
            found.append(row)
            results.setdefault(equation.value, []).append((place, False))
        return found

    def _needed(self) -> list[int]:
        """The equations that the answer may depend on, in order."""
        needed: set[int] = set()
        waiting = [len(self.equations) - 1]
        while waiting:
            step = waiting.pop()
            if step in needed:
                continue
            needed.add(step)
            equation = self.equations[step]
            if len(equation.operands) < 2:
                raise Refused("bare")
            if equation.computed != equation.value:
                raise Refused("inexact")
            for sources in self.sources[step]:
                if not (sources.equations or sources.numbers or sources.word):
                    raise Refused("unexplained")
                waiting += [earlier for earlier, _ in sources.equations]
        return sorted(needed)

    def _refusal(self, place: int) -> str | None:
        """Why a number may not change, whatever the new value; None where it may."""
        number = self.question.numbers[place]
        times = sorted(taken[place] for taken in self.taken)
        if not sum(times):
            return "unneeded"
        if not number.plain or number.value < (Fraction(1, 100) if number.decimals else 2):
            return "not_plain"
        if self.values.count(number.value) > 1 or number.value in self.question.words:
            return "twice"
        if self._summed(place):
            return "summed"
        # Of `5*5`, one 5 is something else. So is, often, one 2 of `30*2` and `9*2`: there and back, say.
        repeated = times[-1] > 1 or (sum(times) > 1 and number.value <= SMALL)
        return "two_sources" if repeated else None

    def _summed(self, place: int) -> bool:
        """Whether a number makes a sum of two or three with one that the solution does not use.

        `12 pets: 3 cats, 5 dogs and 4 birds`: where 12 is not used, it would be wrong of other cats.
        """
        value = self.values[place]
        stated = {*self.values[:place], *self.values[place + 1 :], *self.question.spoken}
        idle = stated - self.used
        if self.question.numbers[place].hundredths:
            stated.add(100)
        return any(
            whole - value - third in stated
            or value - whole - third in stated
            or value + whole + third in stated
            for whole in idle
            for third in (0, *stated)
        )

    # ---- changing ------------------------------------------------------------------------------------

    def twins(self, rng: random.Random) -> Iterator[Twin | str]:
        """For each number of the question, in random order, its twin, or the reason why it has none."""
        places = list(range(len(self.values)))
        rng.shuffle(places)
        for place in places:
            yield self.refusals[place] or self._twin(place, rng)

    def _twin(self, place: int, rng: random.Random) -> Twin | str:
        number = self.question.numbers[place]
        try:
            for text, value in _new_values(self.text, number, rng):
                gold = self.gold_after({place: value})
                if gold is not None:
                    question = self.text[: number.start] + text + self.text[number.end :]
                    return Twin(question, gold, place, number.start, number.text, text)
        except Refused as refused:
            return str(refused)
        return "no_value"

    def gold_after(self, changes: Mapping[int, Number]) -> str | None:
        """The canonical gold when numbers of the question, named by their places, take new values.

        None where these values will not do. Raises Refused where no values will do.
        """
        for place in changes:
            refusal = self.refusals[place]
            if refusal:
                raise Refused(refusal)
        numbers = [changes.get(place, value) for place, value in enumerate(self.values)]
        results = self._rerun(numbers, changes)
        if results is None or results[-1] == self.equations[-1].value:
            return None
        return canonical(results[-1]) if self._keeps_order(numbers, results) else None

    def _keeps_order(self, numbers: list[Number], results: list[Number]) -> bool:
        """Whether the larger of two numbers of the question stays larger, and so does a result against what is idle.

        What is idle, a number or an equation that the answer does not need, may be a limit or the dearer offer.
        """
        stated = [
            *zip(self.values, numbers, strict=True),
            *((value, value) for value in self.question.spoken),
        ]
        found = list(zip((equation.value for equation in self.equations), results, strict=True))
        idle = [pair for pair in stated if pair[0] not in self.used]
        idle += [pair for step, pair in enumerate(found) if step not in self.needed]
        stated.sort()
        return all(map(_same_order, stated, stated[1:])) and all(
            _same_order(a, b) for a in idle for b in found
        )

    def _rerun(self, numbers: list[Number], changes: Mapping[int, Number]) -> list[Number] | None:
        """The value of every equation with these numbers in the question; None where a needed one changes its kind.

        Equations that are not needed are run too where they can be: an alternative that was compared stays the worse.
        """
        results: list[Number] = []
        moved: set[int] = set()
        for step, equation in enumerate(self.equations):
            row = self.sources[step]
            results.append(equation.value)
            if not any(
                any(n in changes for n, _ in sources.numbers) or any(k in moved for k, _ in sources.equations)
                for sources in row
            ):
                continue
            moved.add(step)
            inputs = []
            for operand, sources in zip(equation.operands, row, strict=True):
                found = {divide(results[k], 100) if small else results[k] for k, small in sources.equations}
                found |= {divide(numbers[n], 100) if small else numbers[n] for n, small in sources.numbers}
                if sources.word or not found:
                    found.add(operand.value)
                if len(found) > 1 and step in self.needed:
                    raise Refused("two_sources")
                inputs.append(found.pop())
            result = evaluate(equation.program, inputs)
            if result is None or result.numerator.bit_length() > MAX_BITS:
                return None
            if step in self.needed and not _alike(equation.value, result):
                return None
            results[step] = result
        return results


def _hides_equations(solution: str) -> bool:
    """Whether a line with annotations has more equations in its prose, which the reader leaves out."""
    return any(line.count("=") > 2 * line.count("<<") > 0 for line in solution.split("\n"))


def _same_order(a: tuple[Number, Number], b: tuple[Number, Number]) -> bool:
    """Whether two values, each (before, after), stay equal, or the larger one stays larger."""
    return a[1] == b[1] if a[0] == b[0] else (a[0] < b[0]) == (a[1] < b[1]) and a[1] != b[1]


def _alike(old: Number, new: Number) -> bool:
    """Whether a result stays of its kind: its sign, whole if it was, else with two decimals or as many as it had."""
    if (old > 0) != (new > 0) or (old < 0) != (new < 0):
        return False
    if old.denominator == 1:
        return new.denominator == 1
    return 100 % new.denominator == 0 or old.denominator % new.denominator == 0


def _new_values(text: str, number: QuestionNumber, rng: random.Random) -> Iterator[tuple[str, Number]]:
    """New values in random order, as round as the old one, from half of it to half more, each as it is written."""
    scale = 10**number.decimals
    whole = int(number.value * scale)
    unit = 1
    while whole % (10 * unit) == 0:
        unit *= 10
    if unit > 1 and whole < 10 * unit:
        unit //= 2  # 20 may become 25, and 500 may become 450
    least = max(1 if number.decimals else 2, whole // 2)
    most = max(3 * whole // 2, whole + 3 * unit)
    if number.below is not None:
        most = min(most, number.below * scale - 1)
    choices = range(-(-least // unit) * unit, most + 1, unit)
    article = _ARTICLE.search(text, max(0, number.start - 5), number.start)
    for chosen in rng.sample(choices, min(TRIES, len(choices))):
        digits = f"{chosen // scale:,}" if "," in number.text else str(chosen // scale)
        if number.decimals:
            digits += f".{chosen % scale:0{number.decimals}d}"
        if chosen != whole and (not article or _vowel(digits) == _vowel(number.text)):
            yield digits, normal(Fraction(chosen, scale))


def _vowel(digits: str) -> bool:
    """Whether a number is spoken with a vowel first: an 8, an 11, an 18, an 80."""
    whole = digits.partition(".")[0].replace(",", "")
    return whole.startswith("8") or (whole[:2] in ("11", "18") and len(whole) % 3 == 2)
