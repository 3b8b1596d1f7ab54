"""A second scorer: coherence and the policy's own confidence, half and half.

    regime_w.scorer: stages/regime_w/with_logprob.py

s_end, s_path and s_cf are those of signals.py. s_wm is the mean of its s_wm and of the mean token probability to the
power of 64. Both numbers were chosen on validation questions (bench/vote.py): right over wrong, it ranks better than
s_wm alone and than the probability alone. docs/regime-w.md has the figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from stages.regime_w import signals
from stages.regime_w.confidence import probability
from stages.regime_w.signals import DEFAULT_WEIGHTS, GroupScore


def score_group(
    question: str, trajectories: Sequence[Mapping[str, Any]], weights: Sequence[float] = DEFAULT_WEIGHTS
) -> GroupScore:
    """The signals of one question's trajectories. Raises ValueError when one has no `logprob` or no `tokens`."""
    likely = [probability(trajectory) for trajectory in trajectories]
    if None in likely:
        raise ValueError("a trajectory has no 'logprob' or no 'tokens'; use stages/regime_w/signals.py")
    score = signals.score_group(question, trajectories, weights)
    mixed = [(s_wm + (one or 0.0)) / 2 for s_wm, one in zip(score.s_wm, likely, strict=True)]
    return replace(score, s_wm=mixed)
