"""The third layer: a statement gives the number that a person reads in it, exactly, or none; and no part of one."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.text.answers import canonical
from stages.text.number import UNCLEAR, as_ascii, exact, gold_number, stated

NUMBERS = {
    "plain": [("18", "18"), ("-0", "0"), ("007", "7"), ("+5", "5"), ("3.0", "3"), (".5", "0.5"), ("0.50", "0.5")],
    "grouped": [
        ("1,200", "1200"), ("1,450,000", "1450000"), ("1,00,000", "100000"), ("70 000", "70000"),
        ("70\u202f000", "70000"), ("1'200", "1200"), ("1’200", "1200"), ("1_200", "1200"), ("1.200.000", "1200000"),
        ("1.200,50", "1200.5"), ("1{,}200", "1200"), (r"1\,200", "1200"), ("1,200.75", "1200.75"), ("1,000.", "1000"),
    ],
    "decimal comma": [("12,00 €", "12"), ("12,50", "12.5"), ("0,5", "0.5")],
    "sign": [("-5", "-5"), ("−5", "-5"), ("$-38,000", "-38000"), ("-$5", "-5"), ("- 5", "-5"), ("\n- 18 eggs", "18")],
    "money": [
        ("$18", "18"), (r"\$18", "18"), ("€5", "5"), ("₱16", "16"), ("R$ 16", "16"), ("US$16", "16"), ("Rs. 16",
            "16"),
        ("EUR 16", "16"), ("16 EUR", "16"), ("16₩", "16"), ("$16k", "16000"), ("$1.6M", "1600000"), ("$2bn",
            "2000000000"),
        ("$5m", "5000000"), ("2 million", "2000000"), ("1.5 billion dollars", "1500000000"),
    ],
    "unit": [
        ("18 dollars.", "18"), ("20%", "20"), (r"20\%", "20"), ("5 m", "5"), ("5km", "5"), ("20 m²", "20"),
            ("50 °C", "50"),
        (r"45^\circ", "45"), ("45 stickers each.", "45"), ("5 miles/hour", "5"), ("an 18-hour day", "18"),
            ("3:00 PM", "3"),
        ("2nd", "2"), ("4 a day", "4"), (r"18\text{ dollars}", "18"), ("12 h", "12"),
    ],
    "fraction": [
        ("1/2", "0.5"), ("1/3", "1/3"), ("-2/6 of a pie", "-1/3"), ("1 1/2", "1.5"), ("2½", "2.5"), ("½", "0.5"),
            ("⅔", "2/3"),
        (r"\frac{1}{2}", "0.5"), (r"-\dfrac{3}{4}", "-0.75"), (r"\cfrac{1}{2}", "0.5"), (r"\frac12", "0.5"),
        (r"$ \frac{9}{2} $", "4.5"), (r"2 \frac{1}{2}", "2.5"), (r"2\,\frac{1}{2}", "2.5"),
    ],
    "power of ten": [
        ("1e3", "1000"), (r"1.5 \times 10^{3}", "1500"), (r"$2 \times 10^6$", "2000000"), ("5*10^6 watts", "5000000"),
        ("5×10⁶", "5000000"), (r"3 \cdot 10^{-2}", "0.03"), ("2.5 x 10^3", "2500"),
    ],
    "scripts": [("１８", "18"), ("१८", "18"), ("٣٥", "35"), ("১২", "12"), ("１,２００", "1200")],
    "words before": [
        ("Seth is 16", "16"), ("Total: 16", "16"), ("x = 5", "5"), ("= $18.50", "18.5"), ("approximately 5", "5"),
        (r"\text{she makes } \$18", "18"), ("**Total:** 18", "18"), ("Janet makes $18 every day", "18"), ("≈ 5", "5"),
    ],
    "words behind": [
        ("18 dollars for 2 days", "18"), ("16 because 9 and 7 make 16", "16"), ("18 (since 9*2=18)", "18"),
        ("18 eggs - that is all", "18"), ("26. She has 3 left.", "26"), ("18 dollars every day at 2 markets", "18"),
        ("18, as we saw", "18"), ("18 and that is all", "18"),
        ("3 30-minute episodes", "3"), ("$60 selling 10 jars", "60"), ("$$ x = 80 $$", "80"),
    ],
    "dress": [("**18**", "18"), ("_18_", "18"), ("`18`", "18"), (r"\boxed{18}", "18"), (r"\(18\)", "18"), ("$18$",
        "18"),
              ("<answer>18</answer>", "18"), ("“18”", "18")],
    "calculation": [("9*2 = 18", "18"), ("<<9*2=18>>18", "18"), ("9*2=<<9*2=18>>18 eggs", "18"), ("3 + 4 = 7", "7"),
                    ("20 - 2 = 9 * 2 = 18 eggs", "18")],
}  # fmt: skip
UNREADABLE = {
    "several": ["5 or 7", "5 and 7", "5, 7, 9", "(3, 5)", "5 to 7", "from 5 to 7", "between 5 and 7", "5; 7",
        "5 7", "3 by 5"],
    "compound": ["3 hours 30 minutes", "3 hours and 30 minutes", "10 dollars and 50 cents", "5 feet 6 inches",
        "3 bolts of blue fiber and 1.5 bolts of white fiber"],
    "ratio and time": ["3:5", "7:30", "1/2/2020"],
    "unknown": ["2x", "2 x", "3n", "5y + 1", "x+2", "x-2", r"\frac{3}{4}x", r"9\pi", "9π", r"2\sqrt{3}", "2xy"],
    "operation": ["16 - 3", "5-10", "5–7", "5 + 3", "3 × 4", "2^3", "2³", "2(3)", "5*3", r"5 \times 3", "6 ÷ 2"],
    "malformed": ["1.2.3", "1/0", "1,5", "12,3456", "9" * 400, r"\frac{1}{0}", "1e999"],
    "doubt": ["not 18", "< 5", "either 5 or 7"],
}  # fmt: skip
NOTHING = ["", "infinite", "$", "####", "the eggs", "Step 3: subtract", "unclear. Then 18"]


@pytest.mark.parametrize(("text", "expected"), [pytest.param(*case, id=f"{kind}: {case[0]}") for kind,
    cases in NUMBERS.items() for case in cases])  # fmt: skip
def test_number_is_read_as_a_person_would(text: str, expected: str) -> None:
    value = stated(text)
    assert isinstance(value, int | Fraction)
    assert canonical(value) == expected


@pytest.mark.parametrize("text", [text for texts in UNREADABLE.values() for text in texts])
def test_what_is_not_one_number_is_unclear(text: str) -> None:
    assert stated(text) is UNCLEAR


@pytest.mark.parametrize("text", NOTHING)
def test_what_states_no_number_is_none(text: str) -> None:
    assert stated(text) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("18", "18"), (" $18.50 ", "18.5"), ("18 dollars per day", "18"), ("1,450,000", "1450000"), ("-5", "-5"),
            ("5%", "5"),
        (r"1.5 \times 10^{3}", "1500"), ("1 1/2 cups", "1.5"), ("3244047.0999999996", "3244047.1"),
        ("0.30000000000000004", "0.3"), ("33.333333333333336", "33.333333333333336"), ("18.", "18"), ("12,500",
            "12500"),
        ("12,50", None), ("2 hours 30 minutes", None), ("5 and 7", None), ("18. She has more", None),
            ("18\nand more", None),
        ("18 for 2 days", None), ("18 (or 19)", None), ("2x", None), ("none", None), ("", None), ("5 = five", None),
        ("12,00 €", None),
    ],
)  # fmt: skip
def test_a_gold_is_one_number_with_at_most_a_unit(text: str, expected: str | None) -> None:
    value = gold_number(text)
    assert (None if value is None else canonical(value)) == expected


@pytest.mark.parametrize(
    "text", ["9" * 350 + ".5", "9" * 380 + "." + "9" * 18, "1.234567890123e380", "1.234567890123e-380"]
)
def test_a_gold_of_any_size_is_exact(text: str) -> None:
    """Larger and smaller ones than a float can hold; they have no noise of one."""
    assert gold_number(text) == Fraction(text)


def test_longest_number_is_exact() -> None:
    assert stated("9" * 399) == int("9" * 399) == exact("9" * 399)
    assert exact("9" * 400) is None


def test_every_character_keeps_its_place() -> None:
    text = "１２ × ½ −３ ₱ ’ 。\u202f९"
    assert len(as_ascii(text)) == len(text)
    assert as_ascii(text) == "12 * ½ -3 $ ' 。 9"


@given(st.fractions(max_denominator=10**6))
def test_canonical_form_is_the_same_number(value: Fraction) -> None:
    """What is written as an answer reads back as exactly the same number."""
    assert stated(canonical(value)) == value


@given(
    st.integers(-(10**12), 10**12),
    st.sampled_from(["{:,}", "${:,}", "{:,}.00", "{} eggs.", "**{}**", r"\boxed{{{}}}", "Total: {}", "{} €",
        "<<1={0}>>{0}"]),
)  # fmt: skip
def test_decorations_do_not_change_the_number(value: int, form: str) -> None:
    assert stated(form.format(value)) == value


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from([" or ", ", ", " and ", ":", " - ", " x ",
    " apples ", "; "]))  # fmt: skip
def test_two_numbers_are_never_one_of_them(first: int, second: int, between: str) -> None:
    assert stated(f"{first}{between}{second}") is UNCLEAR


@given(st.lists(st.sampled_from(["1", "12", ",", ".", " ", "/", "-", "+", "x", "or", "$", "%", "^", r"\frac", "{",
    "}", "½", "²", "e", "(", ")", "=", ":", "\n", "k"]), max_size=12))  # fmt: skip
def test_no_text_makes_it_raise(pieces: list[str]) -> None:
    for read in (stated, gold_number):
        value = read("".join(pieces))
        assert value is None or value is UNCLEAR or isinstance(value, int | Fraction)
