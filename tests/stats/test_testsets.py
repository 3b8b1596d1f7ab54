"""Each test set has the figures of Platinum, and policies are paired on it; votes are paired by question."""

from __future__ import annotations

from typing import Any

import pytest

from stages.stats.one import health_warnings, summarise
from stages.stats.paired import compare, compare_tests, compare_votes, sign_flip_p
from stages.stats.testsets import by_test, metrics_of_tests
from tests.stats.rows import policies, row

NAMES = ("SFT", "DPO")


def of(test: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"test": test, **one, "id": f"{test}-{one['id']}"} for one in rows]


def test_each_set_has_its_own_figures() -> None:
    rows = of("one", [row(i, i < 3) for i in range(4)]) + of("two", [row(i, False) for i in range(5)])
    assert {name: len(part) for name, part in by_test(rows).items()} == {"one": 4, "two": 5}
    tests = metrics_of_tests(rows, 1)["tests"]
    assert (tests["one"]["accuracy"], tests["two"]["accuracy"]) == (0.75, 0.0)
    whole = summarise(rows[:4], 1)
    assert tests["one"] == {key: whole[key] for key in tests["one"]} and tests["one"]["questions"] == 4
    assert metrics_of_tests([], 1) == {}


def test_a_gain_on_one_and_a_loss_on_another_are_both_seen() -> None:
    sides = policies(30, 5, 20, 10), policies(5, 30, 20, 10)
    a, b = (of("up", sides[0][i]) + of("down", sides[1][i]) for i in range(2))
    found = compare_tests(a, b, NAMES, 0)["tests"]
    assert list(found) == ["up", "down"]
    assert found["up"]["verdict"].startswith("DPO is better") and found["down"]["verdict"].startswith(
        "SFT is better"
    )
    alone = compare(*sides[1], *NAMES, 0)
    assert found["down"] == {key: alone[key] for key in found["down"]}
    assert found["down"]["difference"] == pytest.approx(-25 / 65)


def test_a_set_that_one_policy_lacks_is_not_compared() -> None:
    a, b = policies(3, 2, 4, 1)
    assert compare_tests(of("one", a), of("two", b), NAMES, 0) == {}
    assert list(compare_tests(of("one", a), of("two", b) + of("one", b), NAMES, 0)["tests"]) == ["one"]


def test_unhealthy_generations_on_a_test_set_are_named() -> None:
    values = {"leak": 0.0, "truncated": 0.0, "tests": {"svamp": {"leak": 0.0, "truncated": 0.2}}}
    (warning,) = health_warnings(values, "DPO")
    assert warning.startswith("DPO on svamp: 20.0% of the completions were cut at the token limit")


def test_votes_are_paired_by_question() -> None:
    """Whatever the order; a tie counts its share; a question that one policy lacks is left out."""
    a = [{"id": f"q{i}", "coherent": value} for i, value in enumerate([0.0, 0.5, 1.0, 0.0, 1.0])]
    b = [{"id": f"q{i}", "coherent": value} for i, value in enumerate([1.0, 1.0, 1.0, 1.0])][::-1]
    found = compare_votes(a, b, NAMES, 0)["coherent"]
    assert found["questions"] == 4 and found["difference"] == pytest.approx(2.5 / 4)
    assert found["difference_low"] < found["difference"] < found["difference_high"]
    assert found["p"] == sign_flip_p([2, 1, 0, 2]) and "smallest_visible" in found
    assert compare_votes([], b, NAMES, 0) == {}
