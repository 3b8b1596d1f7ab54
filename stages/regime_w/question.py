"""Reading a question as a changed question needs it: its digit numbers, and what its words stand for.

    "Ann has 3 bags of a dozen eggs at $0.50 each"   ->   numbers 3 and 0.50; words 12 (dozen) and 100 ($)

A number is *plain* when it can be changed without changing the words around it. What a word stands for is a number
that a solution may take from the question although no digit is there. Used by `stages.regime_w.changed`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from stages.regime_w.solution import MAX_QUESTION_NUMBERS, Number, divide, read_number

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_NUMBER_WORDS = {word: value for value, word in enumerate(_ONES)}
_NUMBER_WORDS |= {word: 10 * value for value, word in enumerate(_TENS, 2)}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
HALF, QUARTER, THIRD = Fraction(1, 2), Fraction(1, 4), Fraction(1, 3)
# What a word can stand for in a calculation. A word may be there without meaning any of it.
_STANDS_FOR: dict[str, tuple[Number, ...]] = {
    "half halves halved halfway": (2, HALF, 50, 1),
    "back roundtrip return returns twice double doubled doubles doubling pair pairs couple both twins": (2,),
    "thrice triple tripled triples triplets": (3,),
    "quadruple quadrupled": (4,),
    "third thirds": (3, THIRD, 1),
    "fourth fourths quarter quarters quarterly": (4, QUARTER, 25, 1),
    "fifth fifths": (5, Fraction(1, 5), 1),
    "sixth sixths": (6, Fraction(1, 6), 1),
    "seventh sevenths": (7, 1),
    "eighth eighths": (8, Fraction(1, 8), 1),
    "ninth ninths": (9, 1),
    "tenth tenths": (10, Fraction(1, 10), 1),
    "once single": (1,),
    "dozen dozens": (12,),
    "week weeks weekly": (7, 52),
    "weekend weekends": (2,),
    "weekday weekdays workday workdays workweek": (5,),
    "fortnight": (14,),
    "day days daily": (7, 24),
    "hour hours hourly": (60, 24),
    "minute minutes": (60,),
    "second seconds": (60, 2),
    "month months monthly": (30, 12, 4),
    "year years yearly annual annually": (12, 365, 52),
    "january march may july august october december": (31,),
    "april june september november": (30,),
    "february": (28,),
    "decade decades": (10,),
    "century centuries": (100,),
    "foot feet inch inches": (12,),
    "yard yards": (3, 36),
    "mile miles": (5280,),
    "pound pounds ounce ounces": (16,),
    "ton tons": (2000,),
    "gallon gallons quart quarts": (4,),
    "pint pints": (2, 8),
    "kilogram kilograms kg kilometer kilometers km gram grams liter liters milliliters ml": (1000,),
    "meter meters centimeter centimeters cm": (100,),
    "cent cents percent percentage dollar dollars": (100,),
    "penny pennies": (1, 100),
    "nickel nickels": (5,),
    "dime dimes": (10,),
    "square squares rectangle rectangular": (4, 2),
    "triangle triangles triangular": (3,),
}  # fmt: skip
_WORDS = {word: values for words, values in _STANDS_FOR.items() for word in words.split()}
_VULGAR = {"½": HALF, "¼": QUARTER, "¾": 3 * QUARTER, "⅓": THIRD, "⅔": 2 * THIRD, "⅛": Fraction(1, 8)}

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]++)(?:\.[0-9]++)?|\.[0-9]++"
_TOKEN = re.compile(rf"(?P<number>{_DIGITS})|(?P<word>[A-Za-z]++)|(?P<sign>[%$½¼¾⅓⅔⅛])")
_FRACTION = re.compile(rf"\s?[/⁄]\s?({_DIGITS})")
# A number that stands so is not plainly a number: part of a fraction, a range, a time, an ordinal, a name, a scale.
_BEFORE = re.compile(r"(?:[A-Za-z0-9/⁄:#^.]|[-–−]\s?|\b(?:[Nn]o\.|[Nn]umber|[Gg]rade|[Cc]hapter) )\Z")
_AFTER = re.compile(
    r"[A-Za-z⁄/:^½¼¾⅓⅔⅛]|[.,][0-9]|\s?[-–−]\s?[0-9]|\s[0-9]|\s?(?:[aApP]\.?[mM]\b|o['’]clock)"
    r"|[- ](?:and|&)[- ](?:an?|one|two|three|1|3)?[-/ ]?(?:half|third|quarter|fourth|2|4)"
    r"|[- ](?:hundred|thousand|million|billion|half|thirds?|quarters?|fourths?|fifths?|to [0-9])"
    r"|[- ](?:dollar[- ])?bills?\b|[- ](?:legs?|wheels?|sides?)\b"
)
_HUNDREDTHS = re.compile(r"\s?(?:%|percent\b|cents?\b|¢)", re.IGNORECASE)
_PERCENT = re.compile(r"\s?(?:%|percent\b)", re.IGNORECASE)
_UNIT = re.compile(r"[- ](hour|day|minute|second|month|inch|week)")
_MOST = {"hour": 24, "day": 7, "minute": 59, "second": 59, "month": 12, "inch": 12, "week": 52}


@dataclass(slots=True, frozen=True)
class QuestionNumber:
    """A number of a question in digits, at [start, end), no part of a fraction.

    `hundredths`: it is a percentage or cents, so that a solution may take a hundredth of it. `below`: what a new value
    must stay below (8 for the days of a week), None without such a bound.
    """

    start: int
    end: int
    text: str
    value: Number
    decimals: int
    hundredths: bool
    plain: bool
    below: int | None


@dataclass(slots=True, frozen=True)
class Question:
    """A question's digit numbers in order; what its words, signs and fractions stand for; what number words say."""

    numbers: list[QuestionNumber]
    words: set[Number]
    spoken: set[Number]


def read_question(text: str) -> Question:
    """The first 100 numbers of a question, and what its words stand for."""
    numbers: list[QuestionNumber] = []
    words: set[Number] = set()
    spoken = _Spoken()
    below = -1  # where the number below the line of a fraction starts
    for match in _TOKEN.finditer(text):
        if match["word"]:
            word = match["word"].lower()
            spoken.add(word, match.start(), match.end())
            words.update(_WORDS.get(word, ()))
        elif match["sign"]:
            words.add(_VULGAR.get(match["sign"], 100))
        elif (read := read_number(match[0])) is not None:
            fraction = _FRACTION.match(text, match.end())
            if fraction:
                below = fraction.start(1)
                words |= _shares(read[0], read_number(fraction[1]))
            elif match.start() == below:
                words.add(read[0])
            elif len(numbers) < MAX_QUESTION_NUMBERS:
                numbers.append(_number(text, match, *read))
    return Question(numbers, words | spoken.values, spoken.values)


def _number(text: str, match: re.Match[str], value: Number, decimals: int) -> QuestionNumber:
    start, end = match.span()
    below: int | None = None
    unit = _UNIT.match(text, end)
    if _PERCENT.match(text, end):
        below = 100
    elif unit:
        below = _MOST[unit[1]] + 1
    if below is not None and value >= below:
        below = None
    hundredths = bool(_HUNDREDTHS.match(text, end))
    plain = not (_BEFORE.search(text, max(0, start - 8), start) or _AFTER.match(text, end))
    return QuestionNumber(start, end, match[0], value, decimals, hundredths, plain, below)


def _shares(above: Number, below: tuple[Number, int] | None) -> set[Number]:
    """What a fraction stands for: its two numbers, its value, and of a part what is left of the whole."""
    if below is None or not below[0]:
        return {above}
    share = divide(above, below[0])
    return {above, share, *({1 - share, below[0] - above} if share < 1 else ())}


class _Spoken:
    """The values of number words: of `two hundred and fifty` 2, 100, 200, 50 and 250."""

    def __init__(self) -> None:
        self.values: set[Number] = set()
        self.total = self.end = 0

    def add(self, word: str, start: int, end: int) -> None:
        """The next word of the text, at [start, end). Words in a row stand at most an `and` apart."""
        part, scale = _NUMBER_WORDS.get(word), _SCALES.get(word)
        if part is None and scale is None:
            return
        before = self.total if start - self.end <= len(" and ") else 0
        self.total = before + part if part is not None else (before or 1) * (scale or 1)
        self.values |= {self.total, *(value for value in (part, scale) if value is not None)}
        self.end = end
