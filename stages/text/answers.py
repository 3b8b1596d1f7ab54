"""The one module that reads answers: used by evaluate, rollout, coherence, preference and `grade` alike.

    read_answer("She makes 9 * 2 = 18.\\n#### $18.00").answer == gold_answer("... #### 18") == "18"

A *strict* answer is, in this order: the first `#### x` after the solution starts; the last `\\boxed{x}`; the
first `The answer is x`, `Answer: x` or `A: x`. The *flexible* answer falls back on the last number. What
belongs to another problem (the prompt repeated before the solution, a next problem begun after it) and what
was thought before the last `</think>` is not looked at. Every step is linear in the text's length.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 399  # of one number; longer ones are never an answer, and exact arithmetic on them is slow
WINDOW = 1200  # characters looked at behind an answer marker

# Characters that mean the same as one ASCII character, so that places in the text stay the same.
_ALIKE = str.maketrans(
    "０１２３４５６７８９−–‐‑－，．％＄／⁄＝：＃×÷’\u00a0\u2009\u202f\u2007\u3000",
    "0123456789-----,.%$//=:#*/'     ",
)
_VULGAR = {
    ord(char): f" {below}"
    for char, below in zip("½¼¾⅓⅔⅕⅛", ("1/2", "1/4", "3/4", "1/3", "2/3", "1/5", "1/8"), strict=True)
}

# One number. `70 000`, `1,000`, `1,00,000` are grouped digits. Possessive quantifiers keep this linear.
_NUMBER = (
    r"(?:[0-9]{1,3}(?:[ ][0-9]{3})++(?![0-9])|[0-9]++(?:(?:,|\{,\})[0-9]{2,}+)*+)(?:\.[0-9]++)?+|\.[0-9]++"
)
_VALUE = re.compile(
    r"(?P<sign>[-+]\s?)?+(?:(?:\\?[$€£¥₹]|US\$|USD|Rs\.?)\s?)?+(?P<inner>-\s?)?+"
    r"(?:(?P<whole>[0-9]{1,9})\s(?=[0-9]{1,9}\s?/\s?[0-9]))?+"
    rf"(?P<number>{_NUMBER})(?P<exponent>[eE][+-]?[0-9]{{1,3}}(?![0-9A-Za-z]))?+"
    rf"(?:\s?/\s?(?P<below>{_NUMBER}))?+"
)
# What may stand between an answer marker and its number.
_LEAD = re.compile(
    r"(?:[\s*_`~≈\"'“”(\[{:>]|=(?!=)"
    r"|\\(?:boxed|fbox|text(?:bf|rm|it)?|math(?:bf|rm)|left|displaystyle|[(\[,;! ])|\$(?!\s?-?\s?[0-9.])"
    r"|(?:[Tt]he |[Ff]inal |[Cc]orrect |[Aa]nswer\b|is\b|about |approximately |equal to )"
    r"|[A-Za-z]\s?=){0,60}+"
)
_FRAC = re.compile(r"\\[dt]?frac\s?(?:\{\s?([^{}]{1,80})\}\s?\{([^{}]{1,80})\}|([0-9])([0-9]))")
_LATEX_SPACE = re.compile(r"\\[,!; ](?=[0-9])")
_OPERATION = re.compile(r"%?(?:[ ]?[A-Za-z]{1,20})?[ ]?[-+*/x][ ]?[$(]{0,2}[0-9.]")
_NOT_ENDED = re.compile(r"[,.]?[0-9]|:(?!00(?![0-9]))[0-9]")
_SCALE = re.compile(r"[*\s]{0,3}(thousand|million|billion|trillion)\b")
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

_PLAIN = re.compile(r" ?\$?(0|-?[1-9][0-9]{0,14})\.?\s*\Z")  # how most completions end: `#### 18`
_SIMPLE = re.compile(r" ?\$?(0|-?[1-9][0-9]{0,14})(?:\.?[ ]?(?:\n|\Z))")
_ANSWER_IS = re.compile(r"(?:\*\*)?\s?(?:is|=|:)(?![ \t:*]*+(?:\n|\Z))")
_A_COLON = re.compile(r"(?:\*\*)?:(?![ \t:*]*+(?:\n|\Z))")
_HEADING = re.compile(r"[ ]*+\**+([0-9]{1,2})[.):]\**+[ ]++\**+[A-Za-z(]")  # `#### 2. Count the eggs`

# Where another problem begins: the pipeline's own prompt form, and the common ones.
_PROBLEM = re.compile(
    r"(?:^|\n)[ \t]*+(?:\*\*)?(?:#{1,3}[ ]?)?(?:Question|Problem|Exercise|Instruction|Human|User|Q)"
    r"(?:[ ]?[0-9]{1,4})?(?:\*\*)?:"
    r"|###[ ]?(?:Instruction|Question|Problem)\b|<\|im_start\|>(?!assistant)"
    r"|<\|start_header_id\|>(?!assistant)|<\|User\|>|<｜User｜>|\[INST\]"
)
_SOLUTION = re.compile(
    r"(?:^|\n)[ \t]*+(?:\*\*)?(?:#{1,3}[ ]?)?(?:Answer|Solution|Response|Assistant|A)(?:\*\*)?:"
    r"|<\|im_start\|>assistant|<\|start_header_id\|>assistant|<\|Assistant\|>|<｜Assistant｜>|\[/INST\]"
)
_PROMPT_AFTER_ANSWER = re.compile(
    r"\b(?:Question|Problem|Instruction)(?:[ ]?[0-9]{1,4})?:|Let's think step by step"
)
_END_TOKEN = re.compile(r"</s>|<\|endoftext\|>|<\|im_end\|>|<\|eot_id\|>|<｜end▁of▁sentence｜>|<\|end\|>")
# A text without any of these holds no prompt, no second problem and no end token (cheap to look for).
_SIGNS = (
    "Q",
    "Problem",
    "Instruction",
    "Exercise",
    "Human",
    "User",
    "<|",
    "<｜",
    "</s>",
    "[INST]",
    "Let's think",
)


@dataclass(slots=True)
class Reading:
    """What was read from one completion.

    `answer` and `flexible_answer` are canonical numbers ('18', '-0.5', '1/3') or None. `found` counts answer
    statements, also those after a next problem began. `leak`: the completion holds pieces of a prompt.
    `start` and `end` bound the solution: after the thinking and a repeated prompt, before a next problem.
    """

    answer: str | None
    flexible_answer: str | None
    found: int
    leak: bool
    empty: bool
    start: int
    end: int


def parse_number(text: str) -> Fraction | None:
    """The exact number that `text` states, without currency, `%`, commas and units; None when there is none.

    Reads `$-38,000`, `70 000`, `1/2`, `1 1/2`, `.5`, `20%` (as 20), `18 dollars.`, `2 million`, `**18**`,
    `\\boxed{18}`, `9*2 = 18`. Not a number: `7:30`, `1.2.3`, a division by zero, 400 digits or more.
    """
    value = _value_at(text, 0, len(text))
    return None if value is None else Fraction(value)


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
    """The canonical gold: what follows the last `####`; without one, the strict answer or the bare number."""
    place = solution.rfind("####")
    answer = read_answer(solution).answer if place < 0 else None
    if answer is not None:
        return answer
    value = _value_at(solution, place + 4 if place >= 0 else 0, len(solution))
    return None if value is None else canonical(value)


def same_answer(a: str | None, b: str | None) -> bool:
    """Whether two canonical answers are one number; an absent answer equals nothing."""
    return a is not None and a == b


def read_answer(completion: str, question: str | None = None) -> Reading:
    """Read the answer a completion states; `question` helps to tell a repeated prompt from the solution."""
    mark = completion.find("####")
    thinks = "think>" in completion
    signs = question in completion if question else False
    for sign in _SIGNS:
        if sign in completion:
            signs = True
            break
    if mark >= 0 and not thinks and not signs:
        plain = _PLAIN.match(completion, mark + 4)
        if plain is not None:
            return Reading(plain[1], plain[1], 1, False, False, 0, len(completion))
    text = completion if completion.isascii() else completion.translate(_ALIKE)
    start, end, leak = 0, len(text), False
    if thinks:
        closed = text.find("</think>")
        if closed < 0:
            return Reading(None, _last_number(text, 0, end), 0, leak, False, 0, end)
        following = _PROBLEM.search(text, closed + 8)
        start = text.rfind("</think>", 0, following.start() if following else end) + 8
        reopened = text.find("<think>", start)
        end = reopened if reopened >= 0 else end
    if signs:
        start, end, leak = _solution_span(text, question, start, end)
    answer, found = _strict(text, start, end)
    flexible = answer if answer is not None else _last_number(text, start, end)
    return Reading(answer, flexible, found, leak, not text[start:].strip(), start, end)


def _solution_span(text: str, question: str | None, start: int, end: int) -> tuple[int, int, bool]:
    """Where the solution lies between a repeated prompt and a next problem; whether there was either."""
    leak = False
    problem = _PROBLEM.search(text, start, end)
    asked = text.find(question.translate(_ALIKE), start, end) if question else -1
    echoed = problem is not None and not text[start : problem.start()].strip()
    if asked >= 0 and question and (echoed or _strict(text, start, asked)[0] is None):
        start, leak = asked + len(question), True
    elif echoed and problem is not None:
        # Without the question's own text, its first line is taken for the question.
        line = re.compile(r"\s*+[^\n]*+").match(text, problem.end())
        start, leak = line.end() if line else problem.end(), True
        turn = _SOLUTION.search(text, problem.end(), start)
        start = turn.start() if turn else start
    if leak:
        turn, problem = _SOLUTION.search(text, start, end), _PROBLEM.search(text, start, end)
        if turn and not (problem and problem.start() < turn.start()):
            start = turn.start()
    token = _END_TOKEN.search(text, start, end)
    end = token.start() if token else end
    following = _PROBLEM.search(text, start, end)
    if following:
        end, leak = following.start(), True
    again = text.find(question.translate(_ALIKE), start, end) if question else -1
    if again >= 0:
        end, leak = again, True
    mark = text.find("####", start, end)
    prompt = _PROMPT_AFTER_ANSWER.search(text, mark, end) if mark >= 0 else None
    if prompt:
        end, leak = prompt.start(), True
    return start, end, leak


def _strict(text: str, start: int, end: int) -> tuple[str | None, int]:
    """The strict answer between `start` and `end`, and the number of answer statements from `start` on."""
    answer: Fraction | int | None = None
    found, heading = 0, 0
    mark = text.find("####", start)
    while mark >= 0:
        place = mark + 4
        title = _HEADING.match(text, place)
        if title and int(title[1]) == heading + 1:
            heading += 1  # headings of steps, counted from 1, are no answers
        else:
            value = _value_at(text, place, end if place < end else len(text))
            if value is not None:
                found += 1
                answer = value if answer is None and place < end else answer
        mark = text.find("####", place)
    if heading == 1 and not found:  # a single `#### 1. ...` is an answer after all
        mark = text.find("####", start)
        answer, found = _value_at(text, mark + 4, end), 1
    if answer is None:
        answer, boxes = _boxed(text, start, end)
        found = found or boxes
    if answer is None:
        stated: dict[Fraction | int, None] = {}
        for place in _phrases(text, start, end):
            value = _value_at(text, place, end)
            if value is not None:
                stated.setdefault(value)
        answer = next(iter(stated), None)
        found = found or len(stated)
    return None if answer is None else canonical(answer), found


def _phrases(text: str, start: int, end: int) -> list[int]:
    """Places right after `The answer is`, `Answer:` and, at the start of a line, `A:`, in order."""
    places = []
    for word, opening in (("nswer", "Aa"), ("ANSWER", "")):
        place = text.find(word, start, end)
        while place >= 0:
            first = place - 1 if opening else place
            whole_word = first == start or not text[first - 1].isalnum()
            match = _ANSWER_IS.match(text, place + len(word), end)
            if match and whole_word and first >= start and (not opening or text[first] in opening):
                places.append(match.end())
            place = text.find(word, place + 1, end)
    place = text.find("A", start, end)
    while place >= 0:
        match = _A_COLON.match(text, place + 1, end)
        if match:
            before = text[max(start, place - 6) : place].rstrip(" \t*")
            if before[-1:] == "\n" or (not before and place - 6 <= start):
                places.append(match.end())
        place = text.find("A", place + 1, end)
    return sorted(places)


def _boxed(text: str, start: int, end: int) -> tuple[Fraction | int | None, int]:
    """The number in the last box, and how many distinct numbers are boxed."""
    values: list[Fraction | int | None] = []
    opened = -1
    box = text.find("boxed", start, end)
    while box >= 0:
        opened = text.find("{", box, box + 8)
        closed = text.find("}", opened, min(end, opened + WINDOW)) if opened >= 0 else -1
        nested = opened >= 0 and text.find("{", opened + 1, closed) >= 0
        values.append(_value_at(text, box + 5, closed if closed >= 0 and not nested else end))
        box = text.find("boxed", box + 5, end)
    if values and values[-1] is None and opened >= 0:  # words before the number
        last = _last_number(text, opened, _closing_brace(text, opened, end))
        values[-1] = None if last is None else Fraction(last)
    return (values[-1] if values else None), len({value for value in values if value is not None})


def _closing_brace(text: str, opened: int, end: int) -> int:
    depth, end = 0, min(end, opened + WINDOW)
    for place in range(opened, end):
        if text[place] == "{":
            depth += 1
        elif text[place] == "}":
            depth -= 1
            if depth == 0:
                return place
    return end


def _value_at(text: str, place: int, end: int) -> Fraction | int | None:
    """The number stated right after `place`; of a calculation, what stands after the line's last `=`."""
    simple = _SIMPLE.match(text, place, end)
    if simple:
        return int(simple[1])
    text = text[place : min(end, place + WINDOW)]
    if not text.isascii():
        text = text.translate(_ALIKE).translate(_VULGAR)
    if "\\" in text:
        text = _LATEX_SPACE.sub("", _FRAC.sub(r" \1\3/\2\4 ", text))
    lead = _LEAD.match(text)
    match = _VALUE.match(text, lead.end() if lead else 0)
    if match is None:
        return None
    if _OPERATION.match(text, match.end()):
        line_end = text.find("\n", match.end())
        equals = text.rfind("=", match.end(), line_end if line_end >= 0 else len(text))
        lead = _LEAD.match(text, equals + 1)
        match = _VALUE.match(text, lead.end() if lead else 0) if equals >= 0 else None
        if match is None:
            return None
    if _NOT_ENDED.match(text, match.end()):
        return None
    value = _value_of(match, bool(match["sign"] and "-" in match["sign"]))
    scale = _SCALE.match(text, match.end())
    return value * _SCALES[scale[1]] if value is not None and scale else value


def _value_of(match: re.Match[str], negative: bool) -> Fraction | None:
    number, below = match["number"], match["below"]
    if len(number) > 2 * MAX_DIGITS or (below and len(below) > 2 * MAX_DIGITS):
        return None
    number = re.sub(r"[ ,{}]", "", number) if len(number) > 3 else number
    if len(number) > MAX_DIGITS:
        return None
    value = Fraction(number)
    if match["exponent"]:
        power = int(match["exponent"][1:])
        if abs(power) > MAX_DIGITS - len(number):
            return None
        value *= Fraction(10) ** power
    if below:
        below = re.sub(r"[ ,{}]", "", below)
        divisor = Fraction(below) if len(below) <= MAX_DIGITS else 0
        if divisor == 0:
            return None
        value /= divisor
    if match["whole"]:
        value += int(match["whole"])
    return -value if negative != bool(match["inner"]) else value


def _last_number(text: str, start: int, end: int) -> str | None:
    """The canonical last number of a text; a minus behind something to subtract from is not its sign."""
    place = end - 1
    while place >= start and not "0" <= text[place] <= "9":
        place -= 1
    last = None
    for match in _VALUE.finditer(text, max(start, place - 2 * MAX_DIGITS), place + 1):
        last = match
    if place < start or last is None:
        return None
    sign, before = last["sign"], text[last.start() - 1 : last.start()]
    value = _value_of(last, sign == "-" and not (before.isalnum() or before == ")"))
    return None if value is None else canonical(value)
