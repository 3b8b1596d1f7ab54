"""The reward is the formula of docs/regime-w.md; kappa 0 is the classical one."""

from __future__ import annotations

from typing import Any

import pytest

from stages.regime_w.reward import reward_parts
from stages.run.params import Reward

DEFAULT = {
    "alpha": 1.0, "beta": 0.5, "kappa": 1.0, "gamma": 0.2, "consensus": 0.9,
    "length_penalty": 0.001, "length_limit": 512,
}  # fmt: skip


def params(**over: Any) -> Reward:
    return Reward(**DEFAULT | over)


@pytest.mark.parametrize(
    ("correct", "s_wm", "mean_wm", "mean_end", "tokens", "terms", "expected"),
    [
        (True, 0.6, 0.4, 0.5, 100, params(), 1 + 0.5 * 0.6),
        (True, 0.6, 0.4, 0.5, 100, params(kappa=0.0), 1 + 0.5 * 0.4),
        (True, 0.6, 0.4, 0.5, 100, params(kappa=2.0), 1 + 0.5 * 0.8),
        (False, 0.6, 0.4, 0.95, 100, params(), 0.5 * 0.6),
        (True, 1.0, 1.0, 0.95, 512, params(), 1 + 0.5 + 0.2),
        (True, 1.0, 1.0, 0.9, 512, params(), 1 + 0.5),
        (False, 0.0, 0.0, 0.0, 612, params(), -0.1),
        (True, 0.0, 0.0, 0.0, None, params(), 1.0),
    ],
)
def test_reward(
    correct: bool,
    s_wm: float,
    mean_wm: float,
    mean_end: float,
    tokens: int | None,
    terms: Reward,
    expected: float,
) -> None:
    assert reward_parts(correct, s_wm, mean_wm, mean_end, tokens, terms).total == pytest.approx(
        expected, abs=1e-12
    )
