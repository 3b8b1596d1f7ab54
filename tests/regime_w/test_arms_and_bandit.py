"""Arm statistics are unbiased and add up; Thompson sampling pays more than uniform, and is repeatable."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stages.regime_w.arms import Sums, add_pulls, arm_rows
from stages.regime_w.bandit import Pull, Thompson, Uniform, pays

ARMS = [f"arm{number}" for number in range(8)]
SKILLS = dict(zip(ARMS, (0.9, 0.97, 0.98, 0.98, 0.99, 0.99, 0.99, 0.5), strict=True))


def pulls(arms: str, rewards: list[float], uniform: bool = True) -> list[dict[str, Any]]:
    pairs = zip(arms, rewards, strict=True)
    return [{"arm": arm, "reward": value, "correct": value > 0, "uniform": uniform} for arm, value in pairs]


def test_arm_rows() -> None:
    arms: Sums = {}
    add_pulls(arms, pulls("abc", [1.0, 1.0, 0.0]))
    add_pulls(arms, pulls("abc", [1.0, 0.0, 0.0]) + pulls("a", [9.0], uniform=False))
    rows = {row["arm"]: row for row in arm_rows(arms)}
    assert (rows["a"]["pulls"], rows["a"]["uniform_pulls"]) == (3, 2)
    assert [rows[arm]["mean_reward"] for arm in "abc"] == [1.0, 0.5, 0.0]  # the adaptive pull is left out
    assert [rows[arm]["regret"] for arm in "abc"] == [0.0, 0.5, 1.0]
    assert [rows[arm]["best_share"] for arm in "abc"] == [0.75, 0.25, 0.0]
    assert rows["b"]["low"] == pytest.approx(0.5 - 1.959964 * 0.5, abs=1e-6)
    assert rows["a"]["low"] == rows["a"]["high"] == 1.0


def test_uniform_pulls_every_arm_once() -> None:
    assert Uniform(ARMS, 8).choose(0, "q") == [Pull(arm, 1 / 8, True) for arm in ARMS]


def test_a_pull_pays_when_both_verdicts_are_there() -> None:
    assert pays([True, True]) == [False, False]
    assert pays([True, False, True]) == [True, True, True]


def play(allocation: str, seed: int, rounds: int = 12, questions: int = 15) -> float:
    """Share of pulls that paid, on a simulated 8-armed problem where one arm often differs."""
    chance = np.random.default_rng(seed)
    bandit = Uniform(ARMS, 8) if allocation == "uniform" else Thompson(ARMS, 8, 0.25, seed)
    paid = []
    for number in range(rounds):
        groups = []
        for question in range(questions):
            pulls = bandit.choose(number, f"q{number}-{question}")
            groups.append([(pull.arm, bool(chance.random() < SKILLS[pull.arm])) for pull in pulls])
            paid += pays([correct for _, correct in groups[-1]])
        bandit.learn(groups)
    return sum(paid) / len(paid)


def test_thompson_beats_uniform_in_yield() -> None:
    gains = [play("thompson", seed) - play("uniform", seed) for seed in range(20)]
    assert sum(gain > 0 for gain in gains) >= 19
    assert sum(gains) / len(gains) > 0.2


def test_choices_follow_from_seed_round_question_and_what_was_learned() -> None:
    """A resumed run that is fed the finished rounds chooses as an undisturbed one, in any order of asking."""
    rounds = [[[(ARMS[(i + j) % 8], j % 3 == 0) for j in range(8)] for i in range(5)] for _ in range(3)]
    first, resumed = Thompson(ARMS, 8, 0.25, 1), Thompson(ARMS, 8, 0.25, 1)
    for number, groups in enumerate(rounds):
        first.choose(number, "a")
        first.learn(groups)
        resumed.learn(reversed(groups))
    assert first.choose(3, "x") == resumed.choose(3, "x")
    assert [first.choose(3, name) for name in "xy"] == [resumed.choose(3, name) for name in "yx"][::-1]
    assert Thompson(ARMS, 8, 0.25, 2).choose(0, "x") != Thompson(ARMS, 8, 0.25, 1).choose(0, "x")


def test_floor_and_propensities() -> None:
    bandit = Thompson(ARMS, 8, 0.5, 3)
    bandit.learn([[("arm7", True), ("arm7", False)]] * 200 + [[(arm, True)] for arm in ARMS[:7]] * 200)
    pulls = [pull for number in range(300) for pull in bandit.choose(1, str(number))]
    by_arm = {arm: sum(pull.arm == arm for pull in pulls) / len(pulls) for arm in ARMS}
    propensity = {pull.arm: pull.propensity for pull in pulls}
    assert sum(pull.uniform for pull in pulls) / len(pulls) == pytest.approx(0.5, abs=0.05)
    assert sum(propensity.values()) == pytest.approx(1)
    assert all(by_arm[arm] == pytest.approx(propensity[arm], abs=0.04) for arm in ARMS)
    assert propensity["arm7"] > 0.5
