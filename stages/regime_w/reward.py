"""The reward of one trajectory: the only part of Regime W that training code may see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.run.params import Reward


@dataclass(slots=True, frozen=True)
class RewardParts:
    """What a reward is the sum of; `length` is 0 or negative."""

    coherence: float
    correct: float
    consensus: float
    length: float

    @property
    def total(self) -> float:
        """The reward."""
        return self.coherence + self.correct + self.consensus + self.length


def reward_parts(
    correct: bool,
    s_wm: float,
    question_s_wm: float,
    question_s_end: float,
    tokens: int | None,
    params: Reward,
) -> RewardParts:
    """The parts of the reward:

        alpha*correct + beta*(S + kappa*(s_wm - S)) + gamma*[correct and s_end > consensus]
            - length_penalty*max(0, tokens - length_limit)

    S and s_end are the question's means, s_wm is the trajectory's own. kappa 0 gives all trajectories of a question the
    same coherence. Without `tokens` (a file from elsewhere may lack them) there is no length penalty.
    """
    excess = 0 if tokens is None else max(0, tokens - params.length_limit)
    return RewardParts(
        coherence=params.beta * (question_s_wm + params.kappa * (s_wm - question_s_wm)),
        correct=params.alpha if correct else 0.0,
        consensus=params.gamma if correct and question_s_end > params.consensus else 0.0,
        length=-params.length_penalty * excess if excess else 0.0,
    )
