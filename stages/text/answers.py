"""The one reader of answers, used by evaluate, rollout, coherence, preference and `grade` alike.

    read_answer("She makes 9 * 2 = 18.\\n#### $18.00").answer == gold_answer("... #### 18") == "18"

Three layers: where the solution is (`span.py`), what states an answer there (this file), what number it states
(`number.py`). These state an answer, the strongest first; of several of one kind the last counts:

    #### 18                        a mark; not in quotation marks, and not the heading of a step
    <answer>18</answer>            a tag
    \\boxed{18}                     a box
    The answer is 18. Answer: 18   a phrase; also A: 18, and "Final Answer" above a line with the number

What states something else than one number gives no answer. The *flexible* answer falls back on the last number of the
solution. Every step is linear in the text's length.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from stages.text.number import (
    DIGITS,
    MAX_DIGITS,
    UNCLEAR,
    WINDOW,
    Stated,
    as_ascii,
    exact,
    gold_number,
    stated,
)
from stages.text.span import is_plain, solution_span

MOST = 100  # statements of one kind that are looked at
LONGEST_BOX = 300  # characters

_PLAIN = re.compile(r" ?\$?(0|-?[1-9][0-9]{0,14})\.?\s*\Z")  # how most completions end: `#### 18`
_HEADING = re.compile(r"[ ]*+\**+([0-9]{1,2})[.):]\**+[ ]++\**+[A-Za-z(]")  # `#### 2. Count the eggs`
_QUOTES = "'\"“”«»"
_QUOTED = re.compile(rf"[^\n{_QUOTES}]{{0,40}}[{_QUOTES}](?=[\s.,)]|\Z)")
_BEFORE_MARK = re.compile(rf"(?:\A|[\s$*=:(])(-?\$?{DIGITS})[\s*]*\Z")
_TAG = re.compile(r"<(?:final_)?answer>", re.IGNORECASE)
_PHRASE = re.compile(
    r"(?<![A-Za-z])(?:[Ff]inal |FINAL )?(?:[Aa]nswer|ANSWER)(?![A-Za-z])[^\n.;!?=:]{0,80}?"
    r"(?:(?:\*\*|__)?\s?[:=]|\s(?:is|was|would be|will be|should be|must be|equals|comes to)(?![A-Za-z]))"
)
_LETTER = re.compile(r"(?:\A|\n)[ \t*]*+A(?:\*\*)?:")
_FINAL = re.compile(r"(?:\A|\n)[ \t#*_]*+(?:[Tt]he )?[Ff]inal [Aa]nswer[ \t:*_]*+(?=\n)", re.IGNORECASE)
_BLANK = re.compile(r"[\s:*_`#]*+")
_BRACE = re.compile("[{}]")
_DIGIT = re.compile("[0-9]")
_LAST = re.compile(
    r"(?P<sign>[-+]\s?)?(?:\\?\$\s?)?(?P<inner>-\s?)?(?:(?P<whole>[0-9]{1,9})\s(?=[0-9]{1,9}\s?/\s?[0-9]))?"
    rf"(?P<number>{DIGITS})(?:\s?/\s?(?P<below>{DIGITS}))?"
)


@dataclass(slots=True)
class Reading:
    """What was read from one completion.

    `answer` and `flexible_answer` are canonical numbers ('18', '-0.5', '1/3') or None. `found` counts answer
    statements, also those after a next problem began. `leak`: the completion holds pieces of a prompt; `tail`: more
    than end tokens stands behind the solution. `start` and `end` bound the solution.
    """

    answer: str | None
    flexible_answer: str | None
    found: int
    leak: bool
    tail: bool
    empty: bool
    start: int
    end: int


def canonical(value: Fraction | int) -> str:
    """The one way a number is written: '18', '-0.5' when the decimals end, else 'p/q'."""
    numerator, denominator = value.numerator, value.denominator
    if denominator == 1:
        return str(numerator)
    twos = (denominator & -denominator).bit_length() - 1
    rest, fives = denominator >> twos, 0
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    if rest != 1:
        return f"{numerator}/{denominator}"
    places = max(twos, fives)
    digits = str(abs(numerator) * 10**places // denominator).rjust(places + 1, "0")
    return f"{'-' if numerator < 0 else ''}{digits[:-places]}.{digits[-places:]}"


def gold_answer(solution: str) -> str | None:
    """The canonical gold: what follows the last `####`, or a bare number, or the strict answer of a worked text.

    None unless it is one number with at most a unit. The noise of binary floats is taken off
    (`3244047.0999999996` means 3244047.1).
    """
    place = solution.rfind("####")
    value = gold_number(solution[place + 4 :] if place >= 0 else solution)
    if value is None:
        return read_answer(solution).answer if place < 0 else None
    return canonical(value)


def same_answer(a: str | None, b: str | None) -> bool:
    """Whether two canonical answers are one number; an absent answer equals nothing."""
    return a is not None and a == b


def read_answer(completion: str, question: str | None = None) -> Reading:
    """Read the answer a completion states; `question` helps to tell a repeated prompt from the solution."""
    plain = is_plain(completion, question)
    if plain:
        simple = _plain_ending(completion)
        if simple:
            return Reading(simple, simple, 1, False, False, False, 0, len(completion))
    text = as_ascii(completion)
    if plain:
        start, end, leak, tail = 0, len(text), False, False
    else:
        start, end, leak, tail, closed = solution_span(text, question, _states)
        if not closed:
            return Reading(None, _last_number(text, 0, end), 0, leak, tail, False, 0, end)
    answer, found = _strict(text, start, end)
    flexible = answer if answer is not None else _last_number(text, start, end)
    return Reading(answer, flexible, found, leak, tail, not text[start:].strip(), start, end)


def _plain_ending(text: str) -> str | None:
    """The answer of a text that ends in `#### 18` or `A: 18` and states nothing else: most do."""
    place = text.find("####") + 4
    if place < 4:
        place = text.find("A:") + 2
        alone = place == 2 or (place > 2 and text[place - 3] == "\n")
        if not alone or "boxed" in text or "nswer" in text or "NSWER" in text:
            return None
    match = _PLAIN.match(text, place)
    return match[1] if match else None


def _states(text: str, start: int, end: int) -> bool:
    return _strict(text, start, end)[0] is not None


def _strict(text: str, start: int, end: int) -> tuple[str | None, int]:
    """The strict answer between `start` and `end`, and the number of answer statements from `start` on."""
    for kind in (_marks, _tags, _boxes, _phrases):
        places = kind(text, start, end)
        if not places:
            continue
        inside = bisect_left(places, end, key=lambda one: one.mark)
        values = [one.value(text) for one in places[max(0, inside - MOST) : inside]]
        said = [value for value in values if value is not None]
        if said:
            later = [one.value(text) for one in places[inside : inside + MOST]]
            numbers = [value for value in said + later if value is not None and value is not UNCLEAR]
            last = said[-1]
            count = len(numbers) if kind is _marks else len(set(numbers))
            return (None if last is UNCLEAR else canonical(last)), count
    return None, 0


class _Place(NamedTuple):
    """A place where an answer may be stated: in text[start:end], or just before its mark."""

    mark: int
    start: int
    end: int
    alone: bool = False  # nothing but the number may stand there

    def value(self, text: str) -> Stated:
        """What is stated there."""
        if self.alone:
            return gold_number(text[self.start : self.end])
        value = stated(text, self.start, self.end)
        if value is None and text.startswith("####", self.mark):  # 98####
            before = _BEFORE_MARK.search(
                text[max(text.rfind("\n", 0, self.mark) + 1, self.mark - 60) : self.mark]
            )
            return stated(before[1]) if before else None
        return value


def _marks(text: str, start: int, end: int) -> list[_Place]:
    """Every `####`, also behind `end`, but for quoted ones and the headings of steps, counted from 1."""
    places: list[_Place] = []
    titles: list[_Place] = []
    mark = text.find("####", start)
    while mark >= 0:
        place = mark + 4
        while text.startswith("#", place):
            place += 1
        following = text.find("####", place)
        stop = min(following if following >= 0 else len(text), end if mark < end else len(text))
        title = _HEADING.match(text, place)
        if title and int(title[1]) == len(titles) + 1:
            titles.append(_Place(mark, place, stop))
        elif not _is_quoted(text, start, mark, place):
            places.append(_Place(mark, place, stop))
        mark = following
    if not places and len(titles) == 1:  # a single `#### 1. ...` is an answer after all
        one = titles[0]
        return [one._replace(end=text.find(".", one.start) + 1)]
    return places


def _is_quoted(text: str, start: int, mark: int, place: int) -> bool:
    """Whether a mark is a quoted example of the format; of one at the beginning, the opening quote may be missing."""
    if mark > start and text[mark - 1] in _QUOTES:
        return True
    first = mark - start < 200 and "=" not in text[start:mark]
    return first and _QUOTED.match(text, place) is not None


def _tags(text: str, start: int, end: int) -> list[_Place]:
    """Every `<answer>`."""
    places: list[_Place] = []
    for tag in _TAG.finditer(text, start, end) if "nswer>" in text or "NSWER>" in text else ():
        closed = text.find("</", tag.end(), min(end, tag.end() + WINDOW))
        places.append(_Place(tag.start(), tag.end(), closed if closed >= 0 else end))
    return places


def _boxes(text: str, start: int, end: int) -> list[_Place]:
    """Every box; one without braces reaches to the end of its line."""
    places = []
    box = text.find("boxed", start, end)
    while box >= 0:
        opened = text.find("{", box + 5, min(end, box + 8))
        first = opened + 1 if opened >= 0 else box + 5
        places.append(_Place(box, first, _closing_brace(text, opened, end) if opened >= 0 else end))
        box = text.find("boxed", box + 5, end)
    return places


def _closing_brace(text: str, opened: int, end: int) -> int:
    depth, end = 0, min(end, opened + LONGEST_BOX)
    for brace in _BRACE.finditer(text, opened, end):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    return end


def _phrases(text: str, start: int, end: int) -> list[_Place]:
    """Every `The answer is`, `Answer:`, `A:` and heading `Final Answer`, in order."""
    places = []
    patterns = (_PHRASE, _FINAL, _LETTER) if "nswer" in text or "ANSWER" in text else (_LETTER,)
    for pattern in patterns:
        for phrase in pattern.finditer(text, start, end):
            line = text.find("\n", phrase.end(), end)
            line = line if line >= 0 else end
            blank = _BLANK.match(text, phrase.end(), min(end, phrase.end() + WINDOW))
            first = blank.end() if blank else phrase.end()
            if first <= line:
                if (
                    " " not in phrase[0].strip()
                    and "=" in text[first:line]
                    and text.find("=", line, end) >= 0
                ):
                    continue  # Answer: 3*4 = 12, and the next line goes on
                places.append(_Place(phrase.start(), phrase.end(), line))
                continue
            # Its line holds nothing else: the number must be alone in the next one.
            line = text.find("\n", first, end)
            line = line if line >= 0 else end
            sentence = " is" in phrase[0] and not _DIGIT.search(
                text, line, end
            )  # The answer is:\nShe has 18 left.
            if sentence or "final" in phrase[0].lower() or not text[line:end].strip():
                places.append(_Place(phrase.start(), first, min(line, first + WINDOW), alone=not sentence))
    return sorted(places)


def _last_number(text: str, start: int, end: int) -> str | None:
    """The canonical last number of a text; a minus behind something to subtract from is not its sign."""
    place = end - 1
    while place >= start and not "0" <= text[place] <= "9":
        place -= 1
    last = None
    for match in _LAST.finditer(text, max(start, place - 2 * MAX_DIGITS), place + 1):
        last = match
    if place < start or last is None:
        return None
    value = exact(last["number"])
    below = exact(last["below"]) if last["below"] else Fraction(1)
    if value is None or not below:
        return None
    value = value / below + int(last["whole"] or 0)
    before = text[last.start() - 1 : last.start()] if last.start() else ""
    minus = bool(last["sign"] and "-" in last["sign"]) and not (before.isalnum() or before == ")")
    return canonical(-value if minus != bool(last["inner"]) else value)
