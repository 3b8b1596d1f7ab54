"""What number a statement gives: one number and at most a unit, read token by token; else none.

    stated("Seth makes $18.00 every day")  Fraction(18)
    stated("9 * 2 = 18 eggs")              Fraction(18)
    stated("2 \\\\frac{1}{2} hours")         Fraction(5, 2)
    stated("5 or 7"), stated("2x")         UNCLEAR
    stated("none at all")                  None

A statement is what stands behind an answer mark, in a box or in a tag. Words may stand before its number. Behind it may
stand a unit, and then anything but another number, an operator or a letter that makes it an unknown.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from typing import Literal, NamedTuple

MAX_DIGITS = 399  # of one number; longer ones are never an answer, and exact arithmetic on them is slow
WINDOW = 1200  # characters of a statement that are looked at
MOST_TOKENS = 60  # of a statement that are looked at
UNIT_WORDS = 3  # a number behind more words does not belong to the first one


class Unclear(Enum):
    """Digits are there, but they are not one number with a unit."""

    UNCLEAR = "unclear"


UNCLEAR: Literal[Unclear.UNCLEAR] = Unclear.UNCLEAR
Stated = Fraction | int | Literal[Unclear.UNCLEAR] | None


class _Alike(dict[int, str]):
    """For each character the ASCII character that means the same, or itself: places in the text stay the same."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        digit = unicodedata.decimal(char, None)
        meant = char if digit is None else str(digit)
        if code > 127 and unicodedata.category(char) == "Sc":
            meant = "$"
        self[code] = meant
        return meant


_ALIKE = _Alike(
    {
        ord(char): meant
        for meant, chars in {
            "-": "−–‐‑‒－﹣", ",": "，٬", ".": "．٫", "%": "％", "/": "／⁄∕", "=": "＝", ":": "：", "#": "＃",
            "*": "×✕∙⋅·＊", "'": "’‘′＇", "(": "（", ")": "）", " ": "\u00a0\u2009\u202f\u2007\u2008\u3000",
        }.items()
        for char in chars
    }
)  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")

_SIMPLE = re.compile(r" ?\$?(0|-?[1-9][0-9]{0,14})(?:\.?[ ]?(?:\n|\Z))")  # how most statements look

DIGITS = (
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]++)?"  # 1,200.50
    r"|[0-9]{1,2}(?:,[0-9]{2}(?=,))+,[0-9]{3}(?![0-9])(?:\.[0-9]++)?"  # 1,00,000
    r"|[0-9]{1,3}(?:\.[0-9]{3}){2,}(?![0-9])(?:,[0-9]++)?"  # 1.200.000
    r"|[0-9]{1,3}\.[0-9]{3},[0-9]{1,2}(?![0-9])"  # 1.200,50
    r"|[0-9]{1,3}(?:(?:'[0-9]{3})+|(?:_[0-9]{3})+|(?:[ ][0-9]{3})+)(?![0-9])(?:\.[0-9]++)?"  # 1'200
    r"|(?:0,[0-9]++|[0-9]++,[0-9]{2})(?![0-9])"  # 12,50
    r"|[0-9]++(?:\.[0-9]++)?|\.[0-9]++)"
    r"(?:[eE][+-]?[0-9]{1,3}(?![0-9A-Za-z]))?"
)
_DECIMAL_COMMA = re.compile(r"0,[0-9]+|[0-9]+,[0-9]{2}")
_TOKEN = re.compile(
    rf"(?P<number>{DIGITS})"
    r"|(?P<fraction>\\[dtc]?frac\s?(?:\{\s?(?P<over>[0-9.,]{1,40})\s?\}\s?\{\s?(?P<under>[0-9.,]{1,40})\s?\}"
    r"|(?P<short_over>[0-9])\s?(?P<short_under>[0-9])))"
    r"|(?P<line>\n)"
    # Markup says nothing: spaces, quotes, LaTeX's dressing, tags.
    r"|(?P<skip>[^\S\n]++|[_`\"“”«»{}\[|~#]++"
    r"|\\(?:text(?:bf|rm|it|sf)?|math(?:bf|rm|it|sf)|mbox|left|right|displaystyle|boxed|fbox|quad|qquad)(?![A-Za-z])"
    r"|\\[(),;:! \[\]]|\\\\|</?[A-Za-z_|]{1,20}>)"
    r"|(?P<currency>(?:US|[A-Z]{1,3})?\\?\$|Rs\.?(?![A-Za-z]))"
    r"|(?P<percent>\\?%)"
    r"|(?P<degree>°|\^?\{?\\circ(?![A-Za-z])\}?|\^[23](?![0-9]))"
    r"|(?P<times>\\(?:times|cdot)(?![A-Za-z])|\*++|[xX](?=\s?[0-9(]))"
    r"|(?P<operator>\\(?:div|pm|mp|over|le|ge|leq|geq|lt|gt)(?![A-Za-z])|[-+/^<>÷±√≤≥])"
    r"|(?P<equals>=|≈|\\(?:approx|equiv)(?![A-Za-z]))"
    r"|(?P<word>[^\W\d_]++(?:['-][^\W\d_]++)*)"
    r"|(?P<stop>[.,;:!?])"
    r"|(?P<open>\()|(?P<close>[)\]])"
    r"|(?P<command>\\[A-Za-z]++)|(?P<other>.)",
    re.DOTALL,
)
_POWER = re.compile(r"\s?\{?\s?10\s?(?:\^|\*\*)\s?\{?\s?([+-]?[0-9]{1,3})\s?\}?(?![0-9])")
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴-⁹⁺⁻]++")
_ANNOTATION = re.compile(r"<<[^<>\n]{0,200}>>")
_LATEX_GROUP = re.compile(r"\{,\}|(?<=[0-9])\\[,! ](?=[0-9]{3})")
_MALFORMED = re.compile(r"[.,]?[0-9]")

_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SHORT_SCALES = {"k": 10**3, "K": 10**3, "M": 10**6, "mn": 10**6, "bn": 10**9}  # 16k
_MONEY_SCALES = {"m": 10**6, "b": 10**9, "B": 10**9, "T": 10**12}  # $5m; without money, metres
_UNIT_LETTERS = frozenset("gmlLhsdWVANJFCKtBk")
_OR = frozenset("or and to through versus vs plus minus times by und oder bis".split())
_NO_LEAD = frozenset("or either between not from".split())
# Words that stand between two numbers which are no compound: `18 dollars for 2 days`.
_LOOSE = frozenset(
    "a an the in on for per each every at from with after before since because as than that which who if when is "
    "are was were so but left more less away total altogether his her their its he she they it this".split()
)
_TITLES = frozenset("step part case problem question stage phase section example option exercise".split())
_FACTORS = frozenset({"number", "fraction", "open", "currency", "command"})


class _Token(NamedTuple):
    kind: str
    text: str
    start: int
    end: int


@dataclass
class _Parser:
    """The tokens of one statement, and a place among them."""

    text: str
    tokens: list[_Token]
    place: int = 0

    def kind(self, ahead: int = 0) -> str:
        place = self.place + ahead
        return self.tokens[place].kind if place < len(self.tokens) else "end"

    def token(self, ahead: int = 0) -> _Token:
        return self.tokens[self.place + ahead]


def as_ascii(text: str) -> str:
    """The text with digits, signs, spaces and currencies of all scripts in ASCII; every character keeps its place."""
    return text if text.isascii() else text.translate(_ALIKE)


def stated(text: str, place: int = 0, end: int | None = None) -> Stated:
    """The number that `text[place:end]` states; UNCLEAR where digits are no single number, None where nothing is.

    Exact: `1/3` is a third. `%` is dropped. A calculation states what stands behind its last `=`.
    """
    end = len(text) if end is None else end
    simple = _SIMPLE.match(text, place, end)
    if simple:
        return int(simple[1])
    number, _ = _read(_plain(text[place : min(end, place + WINDOW)]))
    return number


def gold_number(text: str) -> Fraction | None:
    """The number of a gold: nothing but one number and a unit of a few words. None for anything else."""
    text = _plain(text.strip())
    number, end = _read(text[:WINDOW])
    if number is None or number is UNCLEAR:
        return None
    rest = text[end:].rstrip(".")
    more = re.search(r"[0-9\n.,;:!?=]", rest) or len(rest.split()) > UNIT_WORDS + 1
    comma = _DECIMAL_COMMA.search(text[:end])  # twelve and a half, or twelve and fifty?
    if more or (comma and not re.search(r"[0-9],[0-9]{3}(?![0-9])", text[:end])):
        return None
    return _without_noise(text[:end], Fraction(number))


def exact(digits: str) -> Fraction | None:
    """The number that is written as `digits` (as `DIGITS` matches them), or None when it is too long."""
    mantissa, _, power = digits.lower().partition("e")
    commas, points = mantissa.count(","), mantissa.count(".")
    decimal = "."
    if commas and points:
        decimal = "," if mantissa.rindex(",") > mantissa.rindex(".") else "."
    elif points > 1 or (commas == 1 and _DECIMAL_COMMA.fullmatch(mantissa)):
        decimal = ","
    group = "." if decimal == "," else ","
    plain = re.sub(f"[ '_{group}]", "", mantissa).replace(",", ".")
    if len(plain) > MAX_DIGITS or abs(int(power or 0)) > MAX_DIGITS - len(plain):
        return None
    return Fraction(plain) * Fraction(10) ** int(power or 0)


def _plain(text: str) -> str:
    """The text as the tokens want it: ASCII digits, fractions and powers spelled out, no annotations."""
    if not text.isascii():
        text = _VULGAR.sub(lambda one: " " + unicodedata.normalize("NFKC", one[0]), text)
        text = _SUPERSCRIPT.sub(lambda one: "^" + one[0].translate(_SUPERSCRIPTS), text)
        text = as_ascii(text)
    if "<<" in text:
        text = _ANNOTATION.sub("", text)
    if "{,}" in text or "\\" in text:
        text = _LATEX_GROUP.sub(lambda one: "," if one[0] == "{,}" else "", text)
    return text


def _tokens(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    place = 0
    while place < len(text) and len(tokens) < MOST_TOKENS:
        match = _TOKEN.match(text, place)
        assert match is not None and match.lastgroup is not None, "any character is a token"
        kind = "fraction" if match["fraction"] else match.lastgroup
        if kind != "skip":
            tokens.append(_Token(kind, match[0], place, match.end()))
        place = match.end()
    return tokens


def _read(text: str, calculation: bool = True) -> tuple[Stated, int]:
    """The number of a statement, and where it ends. `calculation`: whether an operation may stand in it."""
    parser = _Parser(text, _tokens(text))
    lead = _lead(parser)
    if lead is None or lead is UNCLEAR:
        return lead, 0
    negative, money, title = lead
    value = _value(parser, money)
    if value is None:
        return UNCLEAR, 0
    end = parser.token(-1).end
    verdict = _tail(parser)
    if title and verdict != "operation":
        return None, 0  # `Step 3: subtract`
    if verdict == "one":
        return (-value if negative else value), end
    if verdict == "operation" and calculation:
        line = text.find("\n", end)
        line = len(text) if line < 0 else line
        equals = max(text.rfind("=", end, line), text.rfind("≈", end, line))
        if equals >= 0:
            number, more = _read(text[equals + 1 : line], calculation=False)
            return (UNCLEAR, 0) if number is None else (number, equals + 1 + more)
    return UNCLEAR, 0


def _lead(parser: _Parser) -> tuple[bool, bool, bool] | Literal[Unclear.UNCLEAR] | None:
    """Step to the number. Returns whether it is negative, an amount of money, and the number of a title.

    None when there is no number, UNCLEAR when what stands before it makes it none.
    """
    negative = money = False
    words: list[str] = []
    before = "start"
    while parser.kind() not in ("number", "fraction", "end"):
        token, following = parser.token(), parser.kind(1)
        if token.kind == "word":
            words.append(token.text.lower())
            if words[-1] in _NO_LEAD:
                return UNCLEAR if any(one.kind == "number" for one in parser.tokens[parser.place :]) else None
            negative = False
        elif token.kind == "line":
            if words and before not in ("equals", ":"):
                return None  # a line of words
        elif token.kind == "stop" and token.text in ".;!?":
            return None
        elif token.kind == "currency":
            money = True
        elif before == "word" and token.text in "+-" and token.start == parser.token(-1).end:
            return UNCLEAR  # x+2
        elif token.text == "-" and following in ("number", "fraction", "currency"):
            adjacent = token.end == parser.token(1).start
            negative = adjacent or (before in ("start", "equals", ":", "currency"))
        elif token.kind == "command" or (token.kind == "operator" and token.text not in "+->"):
            return UNCLEAR
        before = token.text if token.kind == "stop" else token.kind
        parser.place += 1
    if parser.kind() == "end":
        return None
    return negative, money, len(words) == 1 and words[0] in _TITLES


def _value(parser: _Parser, money: bool) -> Fraction | None:
    """The number at this place with its fraction, power of ten and scale; None when it is malformed."""
    value = _number(parser)
    if value is None:
        return None
    whole = value.denominator == 1 and parser.token(-1).kind == "number"
    if whole and parser.kind() == "fraction":  # 2 \frac{1}{2}
        part = _number(parser)
        return None if part is None else value + part
    if whole and [parser.kind(ahead) for ahead in range(3)] == ["number", "operator", "number"]:
        over, slash, under = (parser.token(ahead) for ahead in range(3))
        if slash.text == "/" and over.text.isdigit() and under.text.isdigit() and int(under.text):
            parser.place += 3
            return value + Fraction(int(over.text), int(under.text))  # 1 1/2
    if parser.kind() == "operator" and parser.token().text == "/" and parser.kind(1) == "number":
        parser.place += 1
        below = _number(parser)
        if not below:
            return None
        value /= below
    if parser.kind() == "times" and (power := _POWER.match(parser.text, parser.token().end)):
        if abs(int(power[1])) > MAX_DIGITS:
            return None
        value *= Fraction(10) ** int(power[1])
        while parser.kind() != "end" and parser.token().start < power.end():
            parser.place += 1
    if parser.kind() == "word":
        word, end = parser.token(), parser.token(-1).end
        scales = _SHORT_SCALES | (_MONEY_SCALES if money else {}) if word.start == end else {}
        if scale := scales.get(word.text) or _SCALES.get(word.text.lower()):
            parser.place += 1
            value *= scale
    return value


def _number(parser: _Parser) -> Fraction | None:
    """The number or LaTeX fraction at this place; steps behind it."""
    token = parser.token()
    parser.place += 1
    if token.kind == "number":
        return None if _MALFORMED.match(parser.text, token.end) else exact(token.text)
    match = _TOKEN.match(parser.text, token.start)
    assert match is not None, "it was matched before"
    over = exact(match["over"] or match["short_over"])
    under = exact(match["under"] or match["short_under"])
    return over / under if over is not None and under else None


def _tail(parser: _Parser) -> Literal["one", "operation", "more"]:
    """What stands behind the number: at most a unit ("one"), a calculation, or more that makes it no single number."""
    words = 0
    while parser.kind() not in ("end", "line"):
        token, following = parser.token(), parser.kind(1)
        after = parser.token(-1).end
        next_word = parser.token(1).text.lower() if following == "word" else ""
        if token.kind in ("number", "fraction"):
            # 3 30-minute episodes
            hyphen = parser.text.startswith("-", token.end) and parser.kind(2) == "word"
            return "one" if hyphen or words > UNIT_WORDS else "more"
        if token.kind == "stop":
            if token.text == ":":
                if following == "number" and parser.token(1).text == "00":  # 3:00 PM
                    parser.place += 2
                    continue
                return "one" if following in ("end", "line") else "more"
            if token.text in ",;" and (
                following in ("number", "fraction") or (next_word in _OR and parser.kind(2) == "number")
            ):
                return "more"
            return "one"
        if token.kind == "equals":
            return "operation"
        if token.kind == "times" and (following in _FACTORS or token.text.startswith("\\")):
            return "operation"
        if token.kind == "degree" and not words and token.text[0] == "^" and "circ" not in token.text:
            return "operation"  # 2^3
        if token.kind == "operator":
            if token.text in "-/" and following == "word" and len(next_word) > 1:
                return "one"  # an 18-hour day, miles/hour, 18 - that is all
            if following in _FACTORS or following == "word" or token.text not in "-<>":
                return "operation"
        if token.kind == "open":
            return "more" if not words and token.start == after and following in ("number", "word") else "one"
        if token.kind == "command":
            return "more"
        if token.kind == "word":
            word = token.text.lower()
            alone = following in ("end", "line", "operator", "equals", "times", "close", "stop")
            if len(word) == 1 and token.text not in _UNIT_LETTERS and (token.start == after or alone):
                return "more"  # 2x
            if set(word) <= set("xyz"):
                return "more"
            if word in _OR:
                number = following in ("number", "fraction", "currency")
                return "more" if number else "one"
            words += 1
            if word in _LOOSE or word.endswith("ing") or words > UNIT_WORDS + 2:
                return "one"
        parser.place += 1
    return "one"


def _without_noise(text: str, value: Fraction) -> Fraction:
    """A decimal with the noise of binary floats (3244047.0999999996) as the short decimal that was meant."""
    digits = re.sub("[^0-9]", "", text).lstrip("0")
    if "." not in text or not 16 <= len(digits) <= 17 or abs(value) >= 2**53:
        return value  # no binary float prints so
    short = Fraction(format(float(value), ".15g"))
    close = abs(short - value) * 10**14 < abs(value)
    return short if close and len(str(short.denominator)) + 3 < len(str(value.denominator)) else value
