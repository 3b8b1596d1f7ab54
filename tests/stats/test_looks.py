"""The best of several looks: kept only where a paired test says so, as rarely by luck as the level allows."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest

from stages.stats.looks import judge, kept_words, questions_needed, visible_difference
from stages.stats.p_value import sign_flip_p


def test_the_best_step_and_its_test() -> None:
    """Scores of 0 to 2; step 20 and 30 are alike, so the earlier one is the best. p counts two looks."""
    start = [0, 1, 0, 1, 0, 0, 2, 0, 1, 0]
    better = [2, 1, 2, 2, 2, 1, 2, 2, 1, 2]
    judged = judge({0: start, 20: better, 30: better}, 2, 0.05)
    changes = [after - before for before, after in zip(start, better, strict=True)]
    assert judged == {
        "kept": 20, "best": 20, "last": 30, "looks": 2, "questions": 10, "level": 0.05,
        "score_start": 0.25, "score_best": 0.85, "difference": 0.6,
        "p": pytest.approx(2 / 2**7),  # seven questions changed, all for the better
    }  # fmt: skip
    assert sum(changes) == 12
    assert judge({0: start, 20: better, 30: better}, 2, 0.01)["kept"] == 0
    assert judge({0: start, 20: better}, 2, 0.01)["kept"] == 20


def test_a_level_of_1_keeps_the_best_and_nothing_worse() -> None:
    """As without a test: one more right answer is enough, as many are not."""
    assert judge({0: [0, 1, 0], 5: [1, 1, 0], 9: [0, 0, 0]}, 1, 1.0)["kept"] == 5
    for same_or_worse in ([1, 0, 0], [0, 0, 0]):
        assert judge({0: [0, 1, 0], 5: same_or_worse}, 1, 1.0)["kept"] == 0


def test_one_sided_p_is_the_share_of_signs() -> None:
    """Of the eight signs of 1, 1, 2 the sums 4, 2, 2 and 0, 0 are at least 0, and one is 4."""
    assert sign_flip_p([1, 1, 2], one_sided=True) == 1 / 8
    assert sign_flip_p([1, 1, -2], one_sided=True) == 5 / 8
    assert sign_flip_p([-1, -1, -2], one_sided=True) == 1.0
    many = np.resize(np.array([40_001, -39_999, 3]), 30_000)  # too many to count: drawn
    assert sign_flip_p(many, one_sided=True) == pytest.approx(sign_flip_p(many) / 2, rel=0.1)


def test_luck_is_kept_as_rarely_as_the_level_says() -> None:
    """Nothing is better than step 0. Without counting the looks, the best of five would be kept far more often."""
    rng = np.random.default_rng(5)
    kept, uncorrected, rounds, level = 0, 0, 600, 0.1
    for _ in range(rounds):
        chance = rng.beta(2, 1, size=(80, 1))  # questions differ, looks do not
        right = 2 * rng.binomial(1, chance, size=(80, 6)) + rng.binomial(2, chance, size=(80, 6))
        judged = judge({step: right[:, step].tolist() for step in range(6)}, 4, level)
        kept += bool(judged["kept"])
        uncorrected += judged["p"] / judged["looks"] <= level
    noise = 3 * sqrt(level * (1 - level) / rounds)
    assert level / 3 < kept / rounds < level + noise
    assert uncorrected / rounds > 2 * level


@pytest.mark.parametrize(
    ("difference", "changing", "looks"), [(0.1, 0.15, 1), (0.1, 0.3, 4), (0.05, 0.15, 2)]
)
def test_so_many_questions_show_the_difference(difference: float, changing: float, looks: int) -> None:
    """In about four of five simulated trainings whose best look is really better."""
    rng = np.random.default_rng(1)
    questions = questions_needed(difference, changing, 0.05, looks)
    gain, loss = (changing + difference) / 2, (changing - difference) / 2
    shown = 0
    for _ in range(400):
        gained, lost, _ = rng.multinomial(questions, [gain, loss, 1 - changing])
        changes = [1] * int(gained) + [-1] * int(lost)
        shown += looks * sign_flip_p(changes, one_sided=True) <= 0.05
    assert 0.72 < shown / 400 < 0.88
    assert visible_difference(questions, changing, 0.05, looks) == pytest.approx(difference, abs=2e-3)


def test_too_few_questions_show_nothing() -> None:
    assert visible_difference(10, 0.15, 0.05, 4) is None


def test_the_words() -> None:
    start, better = [0] * 20, [1] * 12 + [0] * 8
    kept = judge({0: start, 8: better, 16: start}, 1, 0.05) | {"start": "the base policy"}
    assert kept_words(kept) == (
        "kept step 8 of 16, the best of 2 looks: 0.0 → 60.0 % of 20 validation questions, p = 0.00049"
    )
    none = judge({0: better, 8: start}, 1, 0.05) | {"start": "the base policy"}
    assert kept_words(none) == (
        "KEPT STEP 0, the base policy: no step is better on validation at level 0.05; "
        "step 8, the only look: 60.0 → 0.0 % of 20 validation questions, p = 1.00"
    )
