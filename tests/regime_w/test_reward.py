"""The reward is DESIGN's formula; kappa 0 is the classical one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stages.regime_w.reward import RewardParams, reward

DEFAULT = RewardParams()


@pytest.mark.parametrize(
    ("correct", "s_wm", "mean_wm", "mean_end", "tokens", "params", "expected"),
    [
        (True, 0.6, 0.4, 0.5, 100, DEFAULT, 1 + 0.5 * 0.6),
        (True, 0.6, 0.4, 0.5, 100, replace(DEFAULT, kappa=0.0), 1 + 0.5 * 0.4),
        (True, 0.6, 0.4, 0.5, 100, replace(DEFAULT, kappa=2.0), 1 + 0.5 * 0.8),
        (False, 0.6, 0.4, 0.95, 100, DEFAULT, 0.5 * 0.6),
        (True, 1.0, 1.0, 0.95, 512, DEFAULT, 1 + 0.5 + 0.2),
        (True, 1.0, 1.0, 0.9, 512, DEFAULT, 1 + 0.5),
        (False, 0.0, 0.0, 0.0, 612, DEFAULT, -0.1),
        (True, 0.0, 0.0, 0.0, None, DEFAULT, 1.0),
    ],
)
def test_reward(
    correct: bool,
    s_wm: float,
    mean_wm: float,
    mean_end: float,
    tokens: int | None,
    params: RewardParams,
    expected: float,
) -> None:
    assert reward(correct, s_wm, mean_wm, mean_end, tokens, params) == pytest.approx(expected, abs=1e-12)


def test_classical_formula_cannot_rank_two_correct_trajectories() -> None:
    """The reason this project exists: at kappa 0 two correct trajectories of one question always tie."""
    classical = replace(DEFAULT, kappa=0.0)
    assert reward(True, 0.9, 0.5, 0.5, 10, classical) == reward(True, 0.1, 0.5, 0.5, 10, classical)
    assert reward(True, 0.9, 0.5, 0.5, 10, DEFAULT) > reward(True, 0.1, 0.5, 0.5, 10, DEFAULT)
