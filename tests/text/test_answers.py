"""The second layer: which statement of a solution is its answer; strict before flexible,
the last of the strongest kind."""

from __future__ import annotations

import pytest

from stages.text.answers import gold_answer, read_answer, same_answer

# completion, strict, flexible
STATEMENTS: dict[str, list[tuple[str, str | None, str | None]]] = {
    "marks": [
        ("9*2=18\n#### 18", "18", "18"),
        ("9*2=18\n#### $18.00 dollars.\n", "18", "18"),
        ("####18", "18", "18"),
        ("##### 18", "18", "18"),
        ("#### \n18", "18", "18"),
        ("####\n\n**18**", "18", "18"),
        ("#### Seth is 18", "18", "18"),
        ("#### Total: 18\nBye 3.", "18", "18"),
        ("the total is 98####", "98", "98"),
        ("It is $98 ####", "98", "98"),
        ("#### 98 ####", "98", "98"),
        ("#### <answer>18</answer>", "18", "18"),
        ("#### \\boxed{18}", "18", "18"),
        ("#### infinite, or 7", None, "7"),
        ("#### 5 or 7", None, "7"),
        ("#### 5 or 7 \\boxed{5}", None, "5"),
    ],
    "several marks": [
        ("#### 18\n#### 19", "19", "19"),
        ("2 x 24 = #### 48 stickers.\n\nTogether #### 90. Shared by two: 90 / 2 = #### 45 stickers each.", "45",
            "45"),
        ("5 * 8 = #### 40.\n\nx = 100 - 40\n\nx = #### 60\n\nSo she started with $60.", "60", "60"),
        ("#### 18\n#### Done", "18", "18"),
        ("#### 5\n#### 5 or 7", None, "7"),
    ],
    "headings": [
        ("#### 1. Count the eggs\n3*4=12\n#### 2. Subtract\n\\boxed{9}", "9", "9"),
        ("#### Step 1: 3*4=12\n#### Step 2: 12-3=9\n#### 9", "9", "9"),
        ("#### 1. A single one", "1", "1"),
    ],
    "tags": [
        ("<answer>\n13\n</answer>\n", "13", "13"),
        ("<answer>12</answer> no: <answer>$13</answer>", "13", "13"),
        ("so <answer>13", "13", "13"),
        ("<answer>5 or 7</answer> The answer is 5", None, "5"),
        ("<answer> </answer> tags: the answer is 5", "5", "5"),
        ("\\boxed{12} <answer>13</answer>", "13", "13"),
    ],
    "boxes": [
        (r"So \boxed{5}, no: \boxed{\frac{1}{2}}.", "0.5", "0.5"),
        (r"\boxed{\text{she makes } \$18}", "18", "18"),
        (r"\boxed{18\text{ dollars}}", "18", "18"),
        (r"\boxed 18", "18", "18"),
        (r"\boxed{x = 18}", "18", "18"),
        (r"\fbox{18} and \boxed{3, 5}", None, "5"),
        (r"\boxed{7} #### 8", "8", "8"),
        (r"\boxed{7}. The answer is 8.", "7", "7"),
    ],
    "phrases": [
        ("The answer is 18.", "18", "18"),
        ("The answer is 17. No, the answer is 18.", "18", "18"),
        ("The final answer is: **$1,018**. Bye 3.", "1018", "1018"),
        ("Therefore, the answer (arabic numerals) is 26.", "26", "26"),
        ("So the answer to the question is 26.", "26", "26"),
        ("The correct answer would be $26.", "26", "26"),
        ("**Answer:** 18 eggs", "18", "18"),
        ("ANSWER = 18", "18", "18"),
        ("The answer is unclear. The answer is 3 + 4 = 7", "7", "7"),
        ("The answer is $ \\frac{1}{2} $.", "0.5", "0.5"),
        ("A: 1,000", "1000", "1000"),
        ("20 people\n<<20/2=10>>10\nA: 10", "10", "10"),
        ("Store B and A: 5 eggs", None, "5"),
        ("He answers 3 times is 5", None, "5"),
    ],
    "a line of its own": [
        ("### Final Answer\n**26**", "26", "26"),
        ("**Final Answer:**\n\n26", "26", "26"),
        ("The final answer is:\n\n$26$\n\nBye 3.", "26", "26"),
        ("Answer:\n26", "26", "26"),
        ("So the answer is:\nSarah will have $10 left over.", "10", "10"),
        ("The answer is:\n3*4=12 apples\n12-2=10 left", None, "10"),
        ("Answer: 23 + 16 = 39 minutes\n39 * 2 = 78 minutes", None, "78"),
        ("Answer: 23 + 16 = 39 minutes", "39", "39"),
        ("Answer:\n3*4=12 apples\n12-2=10 left", None, "10"),
        ("**Answer:**\n\nStep 1: 3*4=12\nStep 2: none", None, "2"),
    ],
    "the last number only": [
        ("It is 16-3 and that makes 13 eggs", None, "13"),
        ("from 10 - 3 we get to -4 degrees", None, "-4"),
        ("half: 1/2", None, "0.5"),
        ("1 1/2 cups", None, "1.5"),
        ("$1,200.50 in all", None, "1200.5"),
        ("no number", None, None),
        ("", None, None),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("completion", "strict", "flexible"), [case for cases in STATEMENTS.values() for case in cases]
)
def test_order_of_statements(completion: str, strict: str | None, flexible: str | None) -> None:
    reading = read_answer(completion)
    assert (reading.answer, reading.flexible_answer) == (strict, flexible)


def test_second_answers_are_counted() -> None:
    assert read_answer("#### 1").found == 1
    assert read_answer("#### 1\nTom has 3.\n#### 2").found == 2
    assert read_answer("#### 1\nQuestion: Tom has 3.\n#### 2").found == 2
    assert read_answer(r"\boxed{1} so \boxed{1}").found == 1
    assert read_answer("nothing 3").found == 0


def test_empty() -> None:
    assert read_answer(" \n").empty
    assert not read_answer("3").empty


@pytest.mark.parametrize(
    ("solution", "gold"),
    [
        ("20 loaves of 3, #### 5 is wrong\n#### 1,450,000", "1450000"),
        ("18", "18"),
        ("20 people\n<<20/2=10>>10\nA: 10", "10"),
        ("12*0.1\n#### 3244047.0999999996", "3244047.1"),
        ("#### none", None),
        ("#### 2 hours 30 minutes", None),
        ("#### 12,50", None),
        ("#### 5 and 7", None),
    ],
)
def test_gold_is_what_follows_the_last_mark_or_a_bare_number(solution: str, gold: str | None) -> None:
    assert gold_answer(solution) == gold


def test_absent_answers_equal_nothing() -> None:
    assert same_answer("1/3", "1/3")
    assert not same_answer(None, None)
    assert not same_answer("1", None)
