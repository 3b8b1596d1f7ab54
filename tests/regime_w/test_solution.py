"""Reading a solution: the forms people and models write, exact, bounded, linear; skips are counted."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.regime_w.solution import MAX_EQUATIONS, Equation, question_numbers, read_solution


def plain(equation: Equation) -> str:
    """Postfix expression = value, with `!` when it does not hold."""
    numbers = [f"{operand.printed}{'%' * operand.percent}" for operand in equation.operands]
    parts = [step if isinstance(step, str) else numbers[step] for step in equation.program]
    return f"{' '.join(parts)} = {equation.value}{'' if equation.holds else ' !'}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<<12-2=10>>10", ["12 2 - = 10"]),
        ("16 eggs - 3 eggs = 13 eggs left", ["16 3 - = 13"]),
        ("(3+4)*2 = 7*2 = 14", ["3 4 + 2 * = 14"]),
        ("2+3 = 5+1 = 6", ["2 3 + = 5", "5 1 + = 6"]),
        ("3 * 4 = 12 - 2 = 10", ["3 4 * = 12", "12 2 - = 10"]),
        ("$1,200 + $300 = $1,500", ["1200 300 + = 1500"]),
        ("80% * 50 = 40", ["80% 50 * = 40"]),
        ("96 seeds / 150 seeds * 100% = 64%", ["96 150 / 100% * = 16/25"]),
        ("3 x 4 = 12, 3×4=12, 3x4 = 12", ["3 4 * = 12"] * 3),
        ("1/2 + 1/2 = 1", ["1 2 / 1 2 / + = 1"]),
        ("1/4 + 2/4 = 3/4", ["1 4 / 2 4 / + = 3/4"]),
        ("(2+3)*4 = 20 apples", ["2 3 + 4 * = 20"]),
        ("9 * $2 = $18.50", ["9 2 * = 37/2 !"]),
        (r"\frac{1}{2} \times 4 = \$2", ["1 2 / 4 * = 2"]),
        (r"\[ \frac{3+4}{2} = \boxed{3.5} \]", ["3 4 + 2 / = 7/2"]),
        ("9 ÷ 3 = 3", ["9 3 / = 3"]),
        ("９＋３＝12", ["9 3 + = 12"]),
        ("4 weeks * 7 days/week = 4 * 7 = 28 days.", ["4 7 * = 28"]),
        ("1 (Howie) + 25 (classmates) = 26 people", ["1 25 + = 26"]),
        ("6 miles/hour * (1/2) hour = 3 miles", ["6 1 2 / * = 3"]),
        ("5 pounds of beef * $4 per pound = $20", ["5 4 * = 20"]),
        ("120(.20)=24", ["120 1/5 * = 24"]),
        ("-5 + 3 = -2", ["5 neg 3 + = -2"]),
        ("**3+4=7**", ["3 4 + = 7"]),
        ("- 3 + 4 = 7", ["3 4 + = 7"]),
        ("Total = 3 + 4 = 7 so 7 * 2 = 14", ["3 4 + = 7", "7 2 * = 14"]),
        ("70 / 60 = 1.17 hours", ["70 60 / = 117/100"]),
        ("7 / 2 = 4", ["7 2 / = 4"]),
        ("7 / 2 = 5", ["7 2 / = 5 !"]),
        ("5 / 0 = 3", ["5 0 / = 3 !"]),
        ("2x = 2 * 11 = 22", ["2 11 * = 22"]),
        ("(3 + 4 = 7)", ["3 4 + = 7"]),
        ("<<5*2/5=2.0=2.0>>", ["5 2 * 5 / = 2"]),
        ("<<3,650*10/100=365>>", ["3650 10 * 100 / = 365"]),
        ("<<12=12>>", ["12 = 12"]),
    ],
)
def test_forms(text: str, expected: list[str]) -> None:
    solution = read_solution(text)
    assert [plain(equation) for equation in solution.equations] == expected
    assert solution.skipped == 0


@pytest.mark.parametrize(
    "text",
    [
        "<<x=11>>",
        "0.75x - 0.25x = 19.50",
        "2 + 4^2 = 18",
        "x + 3 + 4 = 10",
        "12 = 5 + 7",
        "5 * price + 3 = 20",
        f"{'9' * 31} + 1 = 2",
    ],
)
def test_what_cannot_be_read_is_skipped_and_counted(text: str) -> None:
    solution = read_solution(text)
    assert solution.equations == ()
    assert solution.skipped == 1


def test_annotations_replace_the_prose_of_their_line_only() -> None:
    solution = read_solution("She has 2 + 3 = <<2+3=5>>5 eggs\nthen 5 * 2 = 10")
    assert [plain(equation) for equation in solution.equations] == ["2 3 + = 5", "5 2 * = 10"]


def test_places_in_the_text() -> None:
    text = "First,\nit is 16 eggs - 3 eggs = 13 eggs. <<1+1=2>>\nso 3×4=12 – yes"
    texts = [text[equation.start : equation.end] for equation in read_solution(text).equations]
    assert texts == ["<<1+1=2>>", "3×4=12"]
    prose = "it is 16 eggs - 3 eggs = 13 eggs."
    (equation,) = read_solution(prose).equations
    assert prose[equation.start : equation.end] == "16 eggs - 3 eggs = 13"


def test_question_numbers() -> None:
    numbers = question_numbers("$80,000, 20% of 1/2, 2 again, 3.50 and three")
    assert numbers == [80000, 20, 1, 2, Fraction(7, 2)]


def test_equations_are_bounded_and_counted() -> None:
    solution = read_solution("<<1+1=2>>" * (MAX_EQUATIONS + 5))
    assert (len(solution.equations), solution.skipped) == (MAX_EQUATIONS, 5)


NUMBERS = st.integers(0, 999)


@given(NUMBERS, st.lists(st.tuples(st.sampled_from("+-*"), NUMBERS), min_size=1, max_size=5), st.booleans())
def test_values_are_those_of_arithmetic(first: int, rest: list[tuple[str, int]], annotated: bool) -> None:
    """The parser's value of an expression is Python's own (`eval` is safe on text built here)."""
    expression = str(first) + "".join(f" {op} {number}" for op, number in rest)
    value = eval(expression)
    text = f"<<{expression}={value}>>" if annotated else f"it is {expression} = {value} in all"
    (equation,) = read_solution(text).equations
    assert (equation.computed, equation.value, equation.holds) == (value, value, True)


PIECES = [
    "9", "(", ")", "=", "1=", "1+", "1+1=", "1+1=2 ", "1+1=2\n", "<<", "<<1", "<<1+1=2>>", "-", "-,", "- ", "x",
    "1x", "1 x ", r"\frac{", r"\frac{1}{2}", "{", "}", "%", "1,", "1,000,", "123 456 7890 ", "a ", "1 + a ",
    "(a)", "(1", "**", "^", ".", ". ", "1 eggs - ", r"\text{", "/a", "'a", "½", "９", "=-", "((1+", "<<1=1=",
    "2*2=4 4*4=16 ",
]  # fmt: skip


@pytest.mark.parametrize("piece", PIECES)
def test_time_grows_with_length_only(piece: str, ends_soon: Callable[[Callable[[], object]], bool]) -> None:
    """400,000 characters of anything are read; a quadratic reader would not get to their end."""
    text = (piece * (400_000 // len(piece) + 1))[:400_000]
    assert ends_soon(lambda: (read_solution(text), question_numbers(text)))


@given(
    st.lists(
        st.one_of(st.sampled_from([*PIECES, "\n", "12", "3.5", "*", "/", "$", "eggs "]), st.text(max_size=4)),
        max_size=40,
    )
)
def test_no_text_makes_it_raise(pieces: list[str]) -> None:
    text = "".join(pieces)
    for equation in read_solution(text).equations:
        assert 0 <= equation.start < equation.end <= len(text)
