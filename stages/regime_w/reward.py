"""The reward of one trajectory: the only part of Regime W that training code may see."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, frozen=True)
class RewardParams:
    """Weights of the reward's parts; the names are those of params.yaml `regime_w.reward`."""

    alpha: float = 1.0
    beta: float = 0.5
    kappa: float = 1.0
    gamma: float = 0.2
    consensus: float = 0.9
    length_penalty: float = 0.001
    length_limit: int = 512


def reward(
    correct: bool,
    s_wm: float,
    question_s_wm: float,
    question_s_end: float,
    tokens: int | None,
    params: RewardParams,
) -> float:
    """The reward of DESIGN's formula:

        alpha*correct + beta*(S + kappa*(s_wm - S)) + gamma*[correct and s_end > consensus]
            - length_penalty*max(0, tokens - length_limit)

    S and s_end are the question's means, s_wm is the trajectory's own. kappa 0 is the classical formula, in
    which all trajectories of a question share one coherence. `tokens` None (a file from
    elsewhere) costs nothing.
    """
    value = params.beta * (question_s_wm + params.kappa * (s_wm - question_s_wm))
    if correct:
        value += params.alpha
        if question_s_end > params.consensus:
            value += params.gamma
    if tokens is not None and tokens > params.length_limit:
        value -= params.length_penalty * (tokens - params.length_limit)
    return value
