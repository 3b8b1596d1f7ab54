"""Reading a solution: its equations, exactly, each with its place in the text.

    "16 eggs - 3 eggs = 13 eggs left"   ->  16-3=13, holds
    "<<12-2=10>>10"                     ->  12-2=10, holds
    "2+3 = 5+1 = 6"                     ->  2+3=5 and 5+1=6

If a line has `<<...>>` annotations, only these are read, otherwise its prose. docs/regime-w.md explains the rules.
Numbers are exact rationals of bounded size, nothing is ever evaluated as code, and the time is linear in the length of
any text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

Number = int | Fraction
Step = int | str  # of a program: the index of an operand, or an operation
# An equation without its place.
_Parts = tuple["tuple[Operand, ...]", tuple[Step, ...], Number, Number | None, bool]

MAX_DIGITS = 30  # of one number; with MAX_OPERANDS it bounds every intermediate result
MAX_OPERANDS = 64  # of one expression
MAX_EQUATIONS = 1000  # of one solution; further ones are skipped and counted
MAX_BITS = 4096  # of a re-run value's numerator or denominator; a larger one is undefined
CACHED = 60  # characters of an annotation that is remembered
MAX_QUESTION_NUMBERS = 100  # distinct numbers of a question; further ones are not changed

_NUMBER = r"(?:[0-9]{1,3}(?:(?:,|\{,\}|[ ])[0-9]{3}){1,12}(?![0-9])|[0-9]++)(?:\.[0-9]++)?|\.[0-9]++"
_ANNOTATION = re.compile(r"<<([^<>\n]*+)>>")
_QUESTION_NUMBER = re.compile(_NUMBER)
# The form of most annotations, read here because this is twice as fast as the general way below.
_SIMPLE = re.compile(r"(0|[1-9][0-9]{0,14})([-+*/])(0|[1-9][0-9]{0,14})=(0|[1-9][0-9]{0,14})\Z")
_ALIKE = str.maketrans(
    "０１２３４５６７８９×✕✖·∙⋅∗＊÷／⁄−–‐‑－＋＝，．％＄（）\u00a0\u2009\u202f\u2007\u3000’“”",
    '0123456789********///-----+=,.%$()     \'""',
)
# Tokens of prose. The order matters; every alternative is possessive or bounded, so scanning is linear.
_TOKEN = re.compile(
    rf"(?P<number>{_NUMBER})"
    r"|(?P<skip>\s++|[$€£¥₹]|\\[$(\[\])! ,;]|\\(?:boxed|left|right|quad|displaystyle)(?![A-Za-z(])"
    r"|\*\*(?![0-9(])|[`_'\"]|\.(?=[ ]?[-+*/=])|&(?==))"
    r"|(?P<times>\\times|\\cdot|\\ast|[xX](?=[ ]?+(?:\\?[$€£¥₹][ ]?)?(?:\\[dt]?frac)?[.0-9({]))"
    r"|(?P<word>[A-Za-z]++(?:[/'-][A-Za-z]++)*(?:[ ](?![xX])[A-Za-z]{2,}+(?:[/'-][A-Za-z]++)*)*)"
    r"|(?P<equals>(?<![<>!])={1,2}+(?!>))"
    r"|(?P<unit>/(?=[ ]?[A-Za-z]{2})|-(?=[A-Za-z]{2})|\\(?:text|mathrm|textbf|mathbf)\{[^{}\n]{0,60}\}"
    r"|\((?=[^()0-9=\n]{1,60}\))[^()0-9=\n]*+\))"
    r"|(?P<power>\^|\*\*)"
    r"|(?P<operator>[-+*/]|\\div)"
    r"|(?P<open>\\left\(|\()|(?P<close>\\right\)|\))"
    r"|(?P<percent>\\?%)"
    r"|(?P<frac>\\[dt]?frac[ ]?\{)|(?P<brace>[{}])"
    r"|(?P<stop>[\s\S])"
)
_VARIABLES = frozenset("xyznXYZN")
_PRIORITY = {"+": 1, "-": 1, "*": 2, "/": 2, "neg": 3}


# Named tuples are made several times faster than frozen dataclasses, and there are a dozen to a text.
class Operand(NamedTuple):
    """A number as printed in an expression; `percent` divides it by 100."""

    printed: Number
    percent: bool = False
    decimals: int = 0

    @property
    def value(self) -> Number:
        """The number that enters the calculation."""
        return divide(self.printed, 100) if self.percent else self.printed


class Equation(NamedTuple):
    """`expr = value`, found in the text at [start, end).

    `program` is the expression in postfix order: indices into `operands`, and + - * / neg. `value` is the printed
    result, `computed` the real one (None after a division by zero).
    """

    start: int
    end: int
    operands: tuple[Operand, ...]
    program: tuple[Step, ...]
    value: Number
    computed: Number | None
    holds: bool


@dataclass(slots=True, frozen=True)
class Solution:
    """The equations of a text in order, and how many statements with `=` could not be read."""

    equations: tuple[Equation, ...]
    skipped: int


def question_numbers(question: str) -> list[Number]:
    """The first 100 distinct digit numbers of a question, as printed, in order."""
    text = question if question.isascii() else question.translate(_ALIKE)
    numbers: dict[Number, None] = {}
    for match in _QUESTION_NUMBER.finditer(text):
        read = read_number(match[0])
        if read is not None:
            numbers.setdefault(read[0])
            if len(numbers) == MAX_QUESTION_NUMBERS:
                break
    return list(numbers)


def read_number(text: str) -> tuple[Number, int] | None:
    """A digit number and its count of decimals; None above MAX_DIGITS digits."""
    if len(text) > 4 * MAX_DIGITS:
        return None
    if not text.isdigit():
        text = text.replace(",", "").replace(" ", "").replace("{}", "")
    whole, _, decimals = text.partition(".")
    if len(whole) + len(decimals) > MAX_DIGITS:
        return None
    if not decimals:
        return int(whole), 0
    return normal(Fraction(int(whole + decimals), 10 ** len(decimals))), len(decimals)


def normal(value: Number) -> Number:
    """The same number, as an int when it is whole, because ints are several times faster than Fractions."""
    return value.numerator if value.denominator == 1 else value


def divide(a: Number, b: Number) -> Number:
    """Exact a / b. Raises ZeroDivisionError."""
    if isinstance(a, int) and isinstance(b, int):
        quotient, rest = divmod(a, b)
        return quotient if not rest else Fraction(a, b)
    return normal(Fraction(a) / b)


def evaluate(program: tuple[Step, ...], values: list[Number]) -> Number | None:
    """The program's result for these operand values; None on a division by zero."""
    if len(values) == 2 and len(program) == 3:  # most are so short
        return calculate(program[2], values[0], values[1])
    stack: list[Number] = []
    for step in program:
        if isinstance(step, int):
            stack.append(values[step])
            continue
        b = stack.pop()
        if step == "neg":
            stack.append(-b)
            continue
        value = calculate(step, stack.pop(), b)
        if value is None:
            return None
        stack.append(value)
    return normal(stack[0])


def calculate(operation: Step, a: Number, b: Number) -> Number | None:
    """a + b, a - b, a * b or a / b; None on a division by zero."""
    if operation == "+":
        value = a + b
    elif operation == "-":
        value = a - b
    elif operation == "*":
        value = a * b
    else:
        return divide(a, b) if b else None
    return value if type(value) is int else normal(value)


def read_solution(text: str) -> Solution:
    """All equations of `text` in order."""
    equations: list[Equation] = []
    skipped = 0
    place = 0
    for line in text.split("\n"):
        if "=" in line or "＝" in line:
            annotations = list(_ANNOTATION.finditer(line))
            for match in annotations:
                skipped += _read_annotation(match, place, equations)
            if not annotations:
                found, missed = _read_chains(line, place, annotated=False)
                equations += found
                skipped += missed
        place += len(line) + 1
    if len(equations) > MAX_EQUATIONS:
        skipped += len(equations) - MAX_EQUATIONS
        del equations[MAX_EQUATIONS:]
    return Solution(tuple(equations), skipped)


_BINARY: dict[str, tuple[Step, ...]] = {op: (0, 1, op) for op in "+-*/"}


def _read_annotation(match: re.Match[str], place: int, equations: list[Equation]) -> int:
    """Append the equations of one annotation. Returns 1 when nothing could be read from it, else 0."""
    text = match[1]
    read = _known_annotation if len(text) <= CACHED else _annotation
    start, end = match.span()
    found = read(text)
    for parts in found:
        equations.append(Equation(place + start, place + end, *parts))
    return 0 if found else 1


def _annotation(text: str) -> list[_Parts]:
    """The equations of an annotation, without their places."""
    simple = _SIMPLE.match(text)
    if not simple:
        return [equation[2:] for equation in _read_chains(text, 0, annotated=True)[0]]
    a, b, value = int(simple[1]), int(simple[3]), int(simple[4])
    operation = simple[2]
    computed = calculate(operation, a, b)
    holds = computed == value or (computed is not None and -1 <= 2 * (computed - value) <= 1)
    return [((Operand(a), Operand(b)), _BINARY[operation], value, computed, holds)]


# The trajectories of a question repeat each other's equations.
_known_annotation = lru_cache(maxsize=1024)(_annotation)


# ---- prose -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Member:
    """The part of a chain between two `=`."""

    operands: list[Operand]
    program: tuple[Step, ...]
    start: int
    end: int
    first_end: int  # where its first number ends
    bare_fraction: bool  # `3/4`, which may be a printed value

    def number(self) -> tuple[Number, Fraction] | None:
        """Its value and half a unit of its last decimal, when it is a number rather than an expression."""
        if len(self.operands) == 1:
            value, half = self.first_number()
            return (-value if "neg" in self.program else value), half
        if self.bare_fraction:
            value_or_none = self.computed()
            return None if value_or_none is None else (value_or_none, Fraction(0))
        return None

    def first_number(self) -> tuple[Number, Fraction]:
        first = self.operands[0]
        half = Fraction(1, 2 * int("1" + "0" * first.decimals) * (100 if first.percent else 1))
        return first.value, half

    def computed(self) -> Number | None:
        return evaluate(self.program, [operand.value for operand in self.operands])


def _read_chains(line: str, place: int, annotated: bool) -> tuple[list[Equation], int]:
    """The equations of one line or one annotation, and how many chains with `=` gave none."""
    equations: list[Equation] = []
    skipped = 0
    for members in _chains(line):
        found = _read_chain(members, place, annotated)
        equations += found
        skipped += not found
    return equations, skipped


def _read_chain(members: list[_Member | None], place: int, annotated: bool) -> list[Equation]:
    """The equations of `a = b = c ...`. A member that cannot be read is None, and breaks the chain."""
    equations: list[Equation] = []
    step: _Member | None = None  # the expression waiting for its number
    step_value: Number | None = None
    last = len(members) - 1
    for index, member in enumerate(members):
        if member is None:
            step = None
            continue
        number = member.number()
        if len(member.operands) > 1 and not (number and index == last):
            value = member.computed()
            if step is not None:
                if value is not None and value == step_value:
                    continue  # the same step, restated
                equations.append(_equation(step, step_value, *member.first_number(), place, member.first_end))
            step, step_value = member, value
        elif step is not None and number:
            equations.append(_equation(step, step_value, *number, place, member.end))
            step = None
        elif annotated and index == 0 and number:
            step, step_value = member, number[0]  # <<12=12>>
    return equations


def _equation(
    step: _Member, computed: Number | None, value: Number, half: Fraction, place: int, end: int
) -> Equation:
    holds = computed is not None and (computed == value or -half <= computed - value <= half)
    return Equation(
        place + step.start, place + end, tuple(step.operands), step.program, value, computed, holds
    )


class _Expression:
    """An expression that is read token by token, by Dijkstra's shunting yard (1961)."""

    __slots__ = ("end", "first_end", "open", "operands", "start", "tokens")

    def __init__(self, start: int) -> None:
        self.tokens: list[Step] = []
        self.operands: list[Operand] = []
        self.start = self.end = self.first_end = start
        self.open = 0

    def finish(self) -> _Member | None:
        """The expression as a member, None when it holds no number. An outer `(` that is never closed is dropped."""
        tokens = self.tokens
        if self.open:
            depth = 0
            for index in range(len(tokens) - 1, -1, -1):
                depth += (tokens[index] == ")") - (tokens[index] == "(")
                if depth < 0:
                    tokens = tokens[index + 1 :]
                    break
        program: list[Step] = []
        waiting: list[str] = []
        used = [token for token in tokens if isinstance(token, int)]
        if not used:
            return None
        first = used[0]
        for token in tokens:
            if isinstance(token, int):
                program.append(token - first)
            elif token in ("(", "neg"):
                waiting.append(token)
            elif token == ")":
                while waiting[-1] != "(":
                    program.append(waiting.pop())
                waiting.pop()
            else:
                while waiting and waiting[-1] != "(" and _PRIORITY[waiting[-1]] >= _PRIORITY[token]:
                    program.append(waiting.pop())
                waiting.append(token)
        program += reversed(waiting)
        operands = self.operands[first:]
        return _Member(operands, tuple(program), self.start, self.end, self.first_end, program == [0, 1, "/"])


class _Scanner:
    """Reads one line token by token, and cuts it into chains of members.

    expression   the expression that is being read
    complete     it may end here: its last token is a number or a closed parenthesis, perhaps with units after it
    waiting      an operation that counts only if a number follows
    unknown      there are words where an operand should be, so the member that ends at the next `=` cannot be read
    spoilt       nothing can be read before the next `=` or the next stop
    """

    def __init__(self, line: str) -> None:
        self.line = line
        self.indent = len(line) - len(line.lstrip())
        self.chains: list[list[_Member | None]] = []
        self.members: list[_Member | None] = []
        self.braces: list[str] = []
        self.reset()

    def reset(self) -> None:
        self.expression: _Expression | None = None
        self.complete = False
        self.waiting = ""
        self.sign = ""
        self.unknown = False
        self.spoilt = False
        self.touching = False  # only spaces since the last number or parenthesis
        self.fresh = True  # no word since the last stop or `=`
        self.denominator = False  # the next `{` opens one
        self.braces.clear()

    def scan(self, start: int, last_equals: int) -> list[list[_Member | None]]:
        """The chains of the line, from `start` to the end of the chain with the last `=`."""
        for match in _TOKEN.finditer(self.line, start):
            kind = match.lastgroup
            if kind == "skip":
                continue
            if kind == "equals":
                self.close_member(final=False)
            elif kind == "stop":
                self.close_chain()
                if match.start() > last_equals:
                    break
            elif self.spoilt:
                continue
            elif kind == "number":
                self.number(match)
                if match.start() > last_equals and not self.members:
                    break
            elif kind == "word":
                self.word(match[0])
            elif kind == "operator" or kind == "times":
                self.operator(match)
            elif kind == "open" or kind == "frac":
                self.open(match)
            elif kind == "close":
                self.close(match)
            elif kind == "percent":
                self.percent(match.end())
            elif kind == "brace":
                self.brace(match)
            elif kind == "power":  # `**` that touches no number is bold text
                self.spoilt = self.touching or match[0] == "^"
            else:  # a unit in LaTeX or in parentheses
                self.touching = False
        self.close_chain()
        return self.chains

    def number(self, match: re.Match[str]) -> None:
        read = read_number(match[0])
        if read is None:
            self.spoilt = True
            return
        if self.unknown or (self.complete and not self.waiting):
            self.close_chain()
        expression = self.operand_place(match.start())
        if len(expression.operands) == MAX_OPERANDS:
            self.spoilt = True
            return
        expression.tokens.append(len(expression.operands))
        expression.operands.append(Operand(read[0], False, read[1]))
        expression.end = match.end()
        if len(expression.operands) == 1:
            expression.first_end = expression.end
        self.complete = self.touching = True

    def operand_place(self, start: int) -> _Expression:
        """The expression to which an operand or `(` is added next. What was waiting before it is added first."""
        expression = self.expression
        if expression is None:
            expression = self.expression = _Expression(start)
        if self.waiting:
            expression.tokens.append(self.waiting)
            self.waiting = ""
        if self.sign == "-":
            expression.tokens.append("neg")
        self.sign = ""
        return expression

    def word(self, word: str) -> None:
        first = word.split(" ", 1)[0]
        if self.touching and first in _VARIABLES:
            self.spoilt = True
            return
        self.touching = self.fresh = False
        if self.waiting or self.sign or (self.expression is not None and not self.complete):
            # An operation on words does not count, and what follows is not part of the expression.
            self.unknown = True
            self.waiting = self.sign = ""
            if not self.complete:
                self.expression = None

    def operator(self, match: re.Match[str]) -> None:
        text = match[0]
        operation = "/" if text == "\\div" else text if text in "+-*/" else "*"
        self.touching = False
        after = self.line[match.end() : match.end() + 1]
        if self.complete and not self.unknown and not self.waiting:
            self.waiting = operation
        elif operation in "+-" and (self.waiting or (self.expression is not None and not self.complete)):
            self.sign = operation
        elif operation in "+-" and ((self.fresh and self.members) or re.match(r"[0-9.($\\]", after)):
            if self.line[match.start() - 1 : match.start()].isalnum():
                self.spoilt = True
            self.sign = operation
        elif match.start() > self.indent or after != " ":  # not the bullet of a list
            self.spoilt = True

    def open(self, match: re.Match[str]) -> None:
        place = match.start()
        if self.unknown or (self.complete and not self.waiting):
            before = self.line[place - 1 : place]
            if match.lastgroup == "open" and not self.unknown and (before.isdigit() or before == ")"):
                self.waiting = "*"
            else:
                self.close_chain()
        if match.lastgroup == "frac":
            self.braces.append("numerator")
        expression = self.operand_place(place)
        expression.tokens.append("(")
        expression.open += 1
        self.complete = self.touching = False
        self.spoilt = len(expression.tokens) > 6 * MAX_OPERANDS

    def close(self, match: re.Match[str]) -> None:
        expression = self.expression
        if expression is None or not expression.open or not self.complete or self.waiting or self.unknown:
            if self.waiting or self.unknown or (expression is not None and expression.open):
                self.spoilt = True
            else:
                self.close_chain()
            return
        expression.tokens.append(")")
        expression.open -= 1
        expression.end = match.end()
        self.touching = True

    def percent(self, end: int) -> None:
        expression = self.expression
        if self.touching and expression is not None and isinstance(expression.tokens[-1], int):
            last = expression.operands[-1]
            expression.operands[-1] = Operand(last.printed, True, last.decimals)
            expression.end = end
            if len(expression.operands) == 1:
                expression.first_end = end

    def brace(self, match: re.Match[str]) -> None:
        if match[0] == "{":
            if self.denominator:
                self.denominator = False
                self.open(match)
                self.braces.append("denominator")
            else:
                self.braces.append("plain")
            return
        kind = self.braces.pop() if self.braces else "plain"
        if kind != "plain":
            self.close(match)
        if kind == "numerator" and self.expression is not None and not self.spoilt:
            self.waiting, self.denominator = "/", True

    def close_member(self, final: bool) -> None:
        expression = self.expression
        member = None
        readable = expression is not None and self.complete and not self.spoilt
        if expression is not None and readable and (final or not (self.waiting or self.unknown)):
            member = expression.finish()
        if not final or member is not None or self.spoilt:
            self.members.append(member)
        self.reset()

    def close_chain(self) -> None:
        if self.members:
            self.close_member(final=True)
            self.chains.append(self.members)
            self.members = []
        else:
            self.reset()


def _chains(line: str) -> list[list[_Member | None]]:
    """The chains with at least one `=` in a line."""
    if not line.isascii():
        line = line.translate(_ALIKE)
    first, last = line.find("="), line.rfind("=")
    if first < 0:
        return []
    sentence = line.rfind(". ", 0, first) + 2
    if sentence == 1 or line[sentence : sentence + 1] in "+-*/=":
        sentence = 0
    return _Scanner(line).scan(sentence, last)
