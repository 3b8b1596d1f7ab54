"""Twins are right: against the tiny world's exact ones, and each rule against the question that taught it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.regime_w.changed import REASONS, ChangeCounts, Changer, Refused, Twin, changed_rows
from stages.regime_w.question import read_question
from stages.text.answers import gold_answer
from stages.tiny.problems import GOLD_WAYS, Problem, problems

PLATINUM = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k_platinum" / "test.jsonl"
QUESTION = "Ann has 3 bags of 4 apples and eats 2. How many apples are left?"
CHEAPER = (
    "Shop A sells 4 pens at $9 each. Shop B sells 7 at $5 each. What does the shop with the lower bill get?"
)
SOLUTION = "<<3*4=12>>12\n<<12-2=10>>10\n#### 10"


def changer(question: str, solution: str) -> Changer:
    gold = gold_answer(solution)
    assert gold
    return Changer(question, solution, gold)


def after(question: str, solution: str, place: int, value: int) -> str | None:
    """The gold after one change; a refusal's reason."""
    try:
        return changer(question, solution).gold_after({place: value})
    except Refused as refused:
        return str(refused)


def row(question: str, solution: str, name: str = "q") -> dict[str, str | None]:
    return {"id": name, "question": question, "solution": solution, "gold": gold_answer(solution)}


# ---- the tiny world ------------------------------------------------------------------------------------


def variants(problem: Problem) -> Iterator[Problem]:
    """The problem with each of its numbers changed to anything."""
    for value in range(1, 200):
        for place in range(len(problem.start)):
            yield replace(problem, start=(*problem.start[:place], value, *problem.start[place + 1 :]))
        for place, (verb, _) in enumerate(problem.events):
            events = (*problem.events[:place], (verb, value), *problem.events[place + 1 :])
            yield replace(problem, events=events)
        yield replace(problem, factor=value)


def test_twins_of_the_tiny_world_are_exact() -> None:
    """Each twin's text is that of a changed problem, and its gold is that problem's own result."""
    made = 0
    for place, problem in enumerate(islice(problems("platinum", 5), 150)):
        rng = random.Random(place)
        way = rng.choice(list(GOLD_WAYS))
        for twin in changer(problem.question, problem.solution(way)).twins(rng):
            if isinstance(twin, Twin):
                results = {p.result for p in variants(problem) if p.question == twin.question}
                # Above the world's largest count there is no result to compare with.
                assert results <= {None, int(twin.gold)} and results, (twin, problem.solution(way))
                made += int(twin.gold) in results
    assert made > 150


def test_exact_twins_of_the_tiny_world_are_agreed_with() -> None:
    """The other way round: what the generator changes, the rules either refuse or answer alike."""
    agreed = 0
    for place, problem in enumerate(islice(problems("platinum", 6), 300)):
        exact = problem.changed(random.Random(place))
        if exact is None:
            continue
        old, new = read_question(problem.question).numbers, read_question(exact.question).numbers
        changes = {n: b.value for n, (a, b) in enumerate(zip(old, new, strict=True)) if a.value != b.value}
        try:
            gold = changer(problem.question, problem.gold(random.Random(place))).gold_after(changes)
        except Refused:
            continue
        assert gold in (None, str(exact.result))
        agreed += gold is not None
    assert agreed > 80


# ---- the rules -----------------------------------------------------------------------------------------


def test_a_twin() -> None:
    twins = [t for t in changer(QUESTION, SOLUTION).twins(random.Random(1)) if isinstance(t, Twin)]
    assert twins
    for twin in twins:
        a, b, c = (number.value for number in read_question(twin.question).numbers)
        assert twin.gold == str(a * b - c) != "10"
        assert twin.old != twin.new and twin.question[twin.start :].startswith(twin.new)
        assert twin.question.replace(twin.new, twin.old, 1) == QUESTION or twin.new in QUESTION


@pytest.mark.parametrize(
    ("question", "solution", "reason"),
    [
        ("Buy 2 and get 1 free. How many for $6, at $3 a pair?", "<<6/3=2>>2\n<<2+1=3>>3\n#### 3", "deal"),
        (QUESTION, "3x = 12\n<<12-2=10>>10\n#### 10", "unread"),
        (QUESTION, "That is 3*4 = 12, and 12-2 = <<12-2=10>>10, as 5*2 = 10\n#### 10", "unread"),
        (QUESTION, "<<3*4=12>>12\n<<12-2=10>>10\n<<10*4=40>>40\n#### 10", "no_carrier"),
        ("Ann has $5. How many cards at $0.75 can she buy?", "<<5=5>>5\n#### 5", "bare"),
        (QUESTION, "<<3*4=13>>13\n<<13-2=11>>11\n#### 11", "inexact"),
        ("Ann walks 10 miles in 3 days. How far a day?", "<<10/3=3.33>>3.33\n#### 3.33", "inexact"),
        (QUESTION, "<<3*4=12>>12\n<<12-9=3>>3\n#### 3", "unexplained"),
    ],
)
def test_solutions_that_are_not_understood(question: str, solution: str, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        changer(question, solution)


@pytest.mark.parametrize(
    ("question", "solution", "place", "reason"),
    [
        # What the answer does not need may not change.
        ("Ann has 3 bags of 4 apples and 9 pears. How many apples?", "<<3*4=12>>12\n#### 12", 2, "unneeded"),
        # The number is one thing only.
        ("Ann has 3 cats and 3 dogs. How many legs at 4 each?", "<<3+3=6>>6\n<<6*4=24>>24\n#### 24", 0, "twice"),
        ("Ann pays $7 a day for a week. How much?", "<<7*7=49>>49\n#### 49", 0, "twice"),
        ("Ann and two others pay $2 each, 3 times. How much?", "<<3*2=6>>6\n#### 6", 0, "twice"),
        # Five classes on each of the five weekdays: nobody knows which 5 is which.
        ("Ann gives 5 lessons every weekday. How many?", "<<5*5=25>>25\n#### 25", 0, "twice"),
        ("Ann gives 5 lessons a day from Monday to Friday.", "<<5*5=25>>25\n#### 25", 0, "two_sources"),
        # Two results are 3, and an operand is 3.
        (
            "Ann has 6 cats, half of them grey, and 9 dogs, of which 6 are not. How many are grey?",
            "<<6/2=3>>3\n<<9-6=3>>3\n<<3+3=6>>6\n#### 6",
            1,
            "two_sources",
        ),
        # 12 is a dozen as well as 3 * 4.
        ("Ann has 3 bags of 4 eggs. How many dozen?", "<<3*4=12>>12\n<<12/12=1>>1\n#### 1", 0, "two_sources"),
        # The question says the sum too.
        ("Of 9 pets 4 are cats, 5 are dogs. Each cat eats 2 mice.", "<<4*2=8>>8\n#### 8", 1, "summed"),
        ("40% are boys, 60% girls. 200 children. How many girls?", "<<60/100*200=120>>120\n#### 120", 1, "summed"),
        # No plain number.
        ("Ann is at work from 9 am to 11 am. How long?", "<<11-9=2>>2\n#### 2", 0, "not_plain"),
        ("Ann eats 3/4 of 8 plums. How many?", "<<3/4*8=6>>6\n#### 6", 0, 6),
        ("Ann lives on the 5th floor, 3 above Bob. Where is Bob?", "<<5-3=2>>2\n#### 2", 0, "not_plain"),
        ("Each of 6 dogs has 4 legs. How many legs?", "<<6*4=24>>24\n#### 24", 1, "not_plain"),
        ("Ann pays with a $20 bill for 3 plums at $2. Change?", "<<3*2=6>>6\n<<20-6=14>>14\n#### 14", 0, "not_plain"),
        ("Ann eats 1 plum of 6. How many are left?", "<<6-1=5>>5\n#### 5", 0, "not_plain"),
    ],
)  # fmt: skip
def test_numbers_that_may_not_change(question: str, solution: str, place: int, reason: str | int) -> None:
    if isinstance(reason, int):  # the fraction is no number of its own: place 0 is the number behind it
        assert after(question, solution, place, 12) == "9"
        return
    assert after(question, solution, place, 17) == reason


@pytest.mark.parametrize(
    ("question", "solution", "place", "value", "gold"),
    [
        ("Ann shares 12 plums among 4 friends. How many each?", "<<12/4=3>>3\n#### 3", 0, 20, "5"),
        (
            "Ann shares 12 plums among 4 friends. How many each?",
            "<<12/4=3>>3\n#### 3",
            0,
            18,
            None,
        ),  # not whole
        ("Ann has 9 plums and eats 4. How many are left?", "<<9-4=5>>5\n#### 5", 0, 4, None),  # nothing left
        (
            "Ann has 9 plums and eats 4. How many are left?",
            "<<9-4=5>>5\n#### 5",
            0,
            3,
            None,
        ),  # fewer than none
        ("Ann has 9 plums and eats 4. How many are left?", "<<9-4=5>>5\n#### 5", 0, 9, None),  # no change
        # Over 40 hours another wage would count: who worked more still does.
        ("Ann works 30 hours at $7. Over 40 it is $11. Wage?", "<<30*7=210>>210\n#### 210", 0, 35, "245"),
        ("Ann works 30 hours at $7. Over 40 it is $11. Wage?", "<<30*7=210>>210\n#### 210", 0, 45, None),
        # The shop with the lower bill stays that one.
        (CHEAPER, "<<4*9=36>>36\n<<7*5=35>>35\n#### 35", 2, 6, "30"),
        (CHEAPER, "<<4*9=36>>36\n<<7*5=35>>35\n#### 35", 2, 8, None),
        # Percent and cents.
        ("Ann saves 20% of $50. How much?", "<<20%*50=10>>10\n#### 10", 0, 40, "20"),
        ("Ann saves 20% of $50. How much?", "<<0.2*50=10>>10\n#### 10", 0, 40, "20"),
        ("Ann saves 20 percent of $50. How much?", "<<20/100*50=10>>10\n#### 10", 0, 40, "20"),
        ("Ann sells 8 cards for 50 cents each. How many $?", "<<8*.5=4>>4\n#### 4", 1, 75, "6"),
        ("Ann owns 3 dozen eggs. How many?", "<<3*12=36>>36\n#### 36", 0, 5, "60"),
    ],
)
def test_new_golds(question: str, solution: str, place: int, value: int, gold: str | None) -> None:
    assert after(question, solution, place, value) == gold


@pytest.mark.parametrize(
    ("question", "solution", "pattern"),
    [
        ("Ann saves $80,000 a year for 3 years.", "<<80000*3=240000>>240000\n#### 240000", r"\$\d{2,3},000 "),
        ("Ann buys 4 pens at $1.50 each.", "<<4*1.5=6>>6\n#### 6", r"\$\d\.\d0 "),
        ("Ann owns an 8-foot ladder, twice as long as Bob's.", "<<8/2=4>>4\n#### 4", r"an (8|11|18)-foot"),
        ("Ann works 6 days a week at $9 a day.", "<<6*9=54>>54\n#### 54", r"[2-7] days"),
        ("Ann gets 60% of $10.", "<<.6*10=6>>6\n#### 6", r"\d\d% of \$10\b|60% of \$\d+\."),
    ],
)
def test_a_new_number_is_written_like_the_old_one(question: str, solution: str, pattern: str) -> None:
    seen = set()
    for seed in range(30):
        for twin in changer(question, solution).twins(random.Random(seed)):
            if isinstance(twin, Twin):
                assert re.search(pattern, twin.question) or twin.place != 0, twin.question
                seen.add(twin.place)
    assert seen or "ladder" in question


# ---- rows ----------------------------------------------------------------------------------------------


def test_rows_and_counts() -> None:
    rows = [
        row(QUESTION, SOLUTION, "a"),
        row(QUESTION, "<<3*4=13>>13\n<<13-2=11>>11\n#### 11", "b"),
        row("Ann eats 1 plum of 6. How many are left?", "<<6-1=5>>5\n#### 5", "c"),
        row("How many are two and two?", "<<2+2=4>>4\n#### 4", "d"),
    ]
    counts = ChangeCounts()
    everything = list(changed_rows(rows, "all", 7, counts))
    assert counts.questions == 4 and counts.with_twin + counts.refused.total() == 4
    assert counts.refused["inexact"] == 1 and counts.refused["unneeded"] == 1
    assert counts.twins == len(everything) and list(counts.metrics()["refused"]) == list(REASONS)  # type: ignore[call-overload]
    assert {twin["id"] for twin in everything} == {
        "a~2",
        "c~2",
    }  # 3 apples may be no fewer than 2, no more than 4
    one = list(changed_rows(rows, "one", 7, ChangeCounts()))
    assert [twin["of"] for twin in one] == ["a", "c"] and all(twin in everything for twin in one)
    twin = one[0]
    assert list(twin) == ["id", "of", "question", "gold", "change"]
    start, old = twin["change"]["start"], twin["change"]["from"]
    assert QUESTION[start:].startswith(old)
    assert QUESTION[:start] + twin["change"]["to"] + QUESTION[start + len(old) :] == twin["question"]


def test_a_twin_depends_on_the_seed_and_its_own_question_only() -> None:
    rows = [row(QUESTION, SOLUTION, name) for name in "abcdefgh"]
    made = list(changed_rows(rows, "one", 3, ChangeCounts()))
    assert made[4:] == list(changed_rows(rows[4:], "one", 3, ChangeCounts()))
    assert [twin["question"] for twin in made] != [
        twin["question"] for twin in changed_rows(rows, "one", 4, ChangeCounts())
    ]
    assert len({twin["question"] for twin in made}) > 1


@given(
    st.text(alphabet="0123456789 ./,%$-ab½:<>=*+", max_size=60),
    st.text(alphabet="0123456789<>=*+-/.% \n", max_size=60),
)
def test_nothing_breaks_it(question: str, solution: str) -> None:
    rows = [{"id": "x", "question": question, "solution": solution, "gold": "12"}]
    counts = ChangeCounts()
    assert len(list(changed_rows(rows, "all", 1, counts))) == counts.twins


def test_results_that_grow_without_end_are_given_up() -> None:
    """Each equation is the fourth power of the one before, brought back to a small number by a constant."""
    for last, defined in ((4, True), (12, False)):
        constants = [n**4 - (n + 1) for n in range(2, last)]
        question = f"Ann starts at 105 and takes away 103. Later she takes away {', then '.join(map(str, constants))}."
        steps = "".join(f"<<{n}*{n}*{n}*{n}-{c}={n + 1}>>\n" for n, c in enumerate(constants, 2))
        gold = after(question, f"<<105-103=2>>\n{steps}#### {last}", 0, 106)
        assert (gold is not None and gold.isdigit()) == defined


def test_long_input_is_bounded() -> None:
    """A hundred numbers are looked at, and more than fifty equations are not."""
    numbers = " ".join(str(n) for n in range(2, 300))
    assert len(read_question(numbers).numbers) == 100
    chain = "\n".join(f"<<{n}+{n + 1}={2 * n + 1}>>" for n in range(2, 60)) + "\n#### 119"
    with pytest.raises(Refused, match="unread"):
        changer(numbers, chain)


@pytest.mark.skipif(not PLATINUM.exists(), reason="needs GSM8K Platinum, which is not part of the repository")
def test_half_of_platinum_has_a_twin() -> None:
    lines = PLATINUM.read_text(encoding="utf-8").splitlines()
    rows = [
        row(r["question"], r["answer"], f"platinum-{n:05d}") for n, r in enumerate(map(json.loads, lines))
    ]
    counts = ChangeCounts()
    twins = list(changed_rows(rows, "one", 17, counts))
    assert counts.questions == 1209 and len(twins) == counts.with_twin >= 550
    golds = {r["id"]: r["gold"] for r in rows}
    assert all(twin["gold"] != golds[twin["of"]] for twin in twins)


def test_the_docs_name_every_reason() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "changed-questions.md").read_text(encoding="utf-8")
    assert [reason for reason, words in REASONS.items() if f"| {words} |" not in page] == []
