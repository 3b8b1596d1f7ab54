"""Generated problems: golds that are right, splits that cannot overlap, mistakes as often as asked for."""

from __future__ import annotations

import random
import re
from itertools import islice
from pathlib import Path

import pytest

from stages.regime_w.solution import read_solution
from stages.tiny.problems import VERBS, Problem, Split, mislabelled, mistaken, problems

REPO = Path(__file__).resolve().parents[2]
SPLITS: tuple[Split, ...] = ("corpus", "train", "valid", "platinum")

# What each verb does, written down again on purpose: an error in the generator must not repeat itself here.
EFFECTS = {
    "buys": 1, "finds": 1, "is handed": 1, "sells": -1, "loses": -1, "gives away": -1, "hands in": -1
}  # fmt: skip


def take(split: Split, count: int, seed: int = 1) -> list[Problem]:
    return list(islice(problems(split, seed), count))


def solve(question: str) -> int:
    """The answer, from the question's words alone."""
    numbers = [int(n) for n in re.findall(r"\d+", question.split(". ")[0])]
    count = numbers[0] * (numbers[1] if len(numbers) == 2 else 1)
    for verb, n in re.findall(rf"({'|'.join(EFFECTS)}) (\d+)", question):
        count += EFFECTS[verb] * int(n)
        assert count >= 0, question
    if worth := re.search(r"worth \$(\d+)", question):
        return count * int(worth[1])
    if friends := re.search(r"(\d+) friends", question):
        assert count % int(friends[1]) == 0, question
        return count // int(friends[1])
    return count


def calculate(expression: str) -> int:
    """One product or quotient, or a chain of sums and differences."""
    first, *rest = re.findall(r"\d+|[-+*/]", expression)
    value = int(first)
    for operator, number in zip(rest[::2], map(int, rest[1::2]), strict=True):
        results = {"+": value + number, "-": value - number, "*": value * number, "/": value // number}
        value = results[operator]
    return value


def steps(solution: str) -> list[tuple[str, int]]:
    return [(expression, int(value)) for expression, value in re.findall(r"<<([^=]+)=(\d+)>>", solution)]


def test_all_verbs_are_known_here() -> None:
    assert {verb.told.split(" {n}")[0] for verb in VERBS} == set(EFFECTS)


@pytest.mark.parametrize("split", SPLITS)
def test_golds_are_right(split: Split) -> None:
    """Every question, solved a second time from its words, gives its gold; every step adds up."""
    for problem in take(split, 800):
        for style in ("plain", "direct"):
            solution = problem.solution(style)
            assert solution.splitlines()[-1] == f"#### {solve(problem.question)}", problem.question
            assert steps(solution)[-1][1] == solve(problem.question)
            for expression, value in steps(solution):
                assert calculate(expression) == value, solution


def test_splits_share_nothing_whatever_the_seeds() -> None:
    """Also when every split is drawn by another seed: the key decides, not the order of drawing."""
    for seeds in ((1, 1, 1, 1), (1, 2, 3, 4), (17, 99, 17, 5)):
        drawn = [take(split, 1500, seed) for split, seed in zip(SPLITS, seeds, strict=True)]
        keys = [{problem.key for problem in part} for part in drawn]
        assert sum(map(len, keys)) == len(set().union(*keys)) == 4 * 1500


def test_the_same_seed_gives_the_same_problems() -> None:
    assert [p.question for p in take("train", 50, 3)] == [p.question for p in take("train", 50, 3)]
    assert [p.question for p in take("train", 50, 3)] != [p.question for p in take("train", 50, 4)]


def test_mistakes_are_in_the_operation_never_in_the_sum() -> None:
    """The text stays plausible: each step adds up, no count is negative, the last value is the answer."""
    rng = random.Random(0)
    for problem in take("corpus", 1500):
        for style in ("plain", "direct"):
            text = mistaken(problem, style, rng, 0.7, 0.3)
            assert all(calculate(expression) == value >= 0 for expression, value in steps(text)), text
            assert text.splitlines()[-1] == f"#### {steps(text)[-1][1]}"


def at_first(problem: Problem) -> int:
    return problem.start[0] * (problem.start[1] if len(problem.start) == 2 else 1)


def has_confused(problem: Problem) -> bool:
    return any(verb.confused for verb, _ in problem.events)


def test_systematic_mistakes_are_as_frequent_as_asked_for() -> None:
    """Of problems with one confusing verb, `confused_share` are solved wrongly; of the others none."""
    rng = random.Random(0)
    drawn = take("corpus", 6000)
    sound = [problem for problem in drawn if not has_confused(problem)]
    assert all(mistaken(problem, "plain", rng, 1.0, 0.0) == problem.answer for problem in sound)
    assert all(mistaken(problem, "plain", rng, 0.0, 0.0) == problem.answer for problem in drawn)
    # A plain count far from zero: no mistake is taken back for making it negative or indivisible.
    one = [
        problem
        for problem in drawn
        if sum(verb.confused for verb, _ in problem.events) == 1 and problem.closing == "count"
        and at_first(problem) > 27
    ]  # fmt: skip
    assert len(one) > 200
    for share in (0.25, 0.65, 1.0):
        wrong = sum(mistaken(problem, "plain", rng, share, 0.0) != problem.answer for problem in one) / len(
            one
        )
        spread = (share * (1 - share) / len(one)) ** 0.5
        assert abs(wrong - share) <= 4 * spread


def test_slips_are_as_frequent_as_asked_for() -> None:
    """A problem with two plain steps comes out right with probability (1 - slip)^2."""
    rng = random.Random(0)
    two = [
        problem
        for problem in take("corpus", 6000)
        if len(problem.events) == 2 and not has_confused(problem) and problem.closing == "count"
        and at_first(problem) > 18
    ]  # fmt: skip
    assert len(two) > 300
    right = sum(mistaken(problem, "plain", rng, 1.0, 0.1) == problem.answer for problem in two) / len(two)
    assert abs(right - 0.81) <= 4 * (0.81 * 0.19 / len(two)) ** 0.5


def test_mislabelled_solutions_are_wrong_in_two_ways() -> None:
    """Another answer than the right one, from wrong operations or from a sum that does not hold."""
    rng = random.Random(3)
    slips = 0
    for problem in take("train", 300):
        text = mislabelled(problem, rng)
        answer = text.rpartition("#### ")[2]
        assert int(answer) != solve(problem.question) and int(answer) >= 0
        equations = read_solution(text).equations
        assert str(equations[-1].value) == answer
        slips += not equations[-1].holds
    assert 100 < slips < 240
