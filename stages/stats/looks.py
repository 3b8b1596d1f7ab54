"""Whether the best of several looks at a policy in training is really better than its start.

Each look asks the same validation questions. The best of several looks is partly the luckiest one: it is taken for
better than the start (step 0) only where a paired test says so, and the test counts how many looks there were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, sqrt
from statistics import NormalDist
from typing import Any

from stages.stats.p_value import p_words, sign_flip_p

POWER = 0.8
LUCK = "The gain of a step picked as the best of several looks is, on average, larger than its real one."


def judge(scores: Mapping[int, Sequence[int]], most: int, level: float) -> dict[str, Any]:
    """Which step is kept, from a whole number of 0 to `most` for each step and question, in one order of questions.

    The best step is the one with the largest sum, the earliest among equals. It is kept when its sum is larger than
    that of step 0 and p <= `level`; else step 0 is. p is one-sided, from the paired sign-flip test of the best step
    against step 0, times the number of looks after step 0 (Bonferroni). If no step is better than step 0, another one
    is kept at most with probability `level`, however alike the looks are. A level of 1 always keeps the best.

    Keys: kept, best (of the steps after 0), last, looks (after 0), questions, level, score_start and score_best (means
    in [0, 1], of step 0 and of the best step), difference, p.
    """
    start = scores[0]
    later = {step: sum(values) for step, values in scores.items() if step}
    best = max(later, key=lambda step: (later[step], -step))
    changes = [after - before for before, after in zip(start, scores[best], strict=True)]
    p = min(1.0, len(later) * sign_flip_p(changes, one_sided=True))
    unit = most * len(start)
    return {
        "kept": best if sum(changes) > 0 and p <= level else 0,
        "best": best,
        "last": max(later),
        "looks": len(later),
        "questions": len(start),
        "level": level,
        "score_start": sum(start) / unit,
        "score_best": later[best] / unit,
        "difference": sum(changes) / unit,
        "p": p,
    }


def kept_words(judged: Mapping[str, Any]) -> str:
    """What `judge` found, in one clause; `judged["start"]` names the policy of step 0."""
    looks = f"the best of {judged['looks']} looks" if judged["looks"] > 1 else "the only look"
    scores = f"{100 * judged['score_start']:.1f} → {100 * judged['score_best']:.1f} %"
    found = f"{scores} of {judged['questions']} validation questions, {p_words(judged['p'])}"
    if judged["kept"]:
        return f"kept step {judged['kept']} of {judged['last']}, {looks}: {found}"
    return (
        f"KEPT STEP 0, {judged['start']}: no step is better on validation at level {judged['level']:g}; "
        f"step {judged['best']}, {looks}: {found}"
    )


def questions_needed(difference: float, changing: float, level: float, looks: int) -> int:
    """How many questions show a true difference with power 80 % in the test of `judge`, by normal approximation.

    `changing` is the share of questions whose verdict differs between the two steps (at least `difference`). Connor
    (1987, Biometrics 43:207) for McNemar's test: n = (z_a sqrt(c) + z_b sqrt(c - d^2))^2 / d^2, here one-sided at
    `level / looks`. The score of `judge` averages a greedy answer and samples, and so needs somewhat fewer.
    """
    z_level, z_power = (NormalDist().inv_cdf(1 - share) for share in (level / looks, 1 - POWER))
    spread = z_level * sqrt(changing) + z_power * sqrt(changing - difference**2)
    return ceil(spread**2 / difference**2)


def visible_difference(questions: int, changing: float, level: float, looks: int) -> float | None:
    """The smallest difference that so many questions show, the inverse of `questions_needed`; None when none is."""
    low, high = 0.0, changing
    if questions_needed(high, changing, level, looks) > questions:
        return None
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (
            (low, middle) if questions_needed(middle, changing, level, looks) <= questions else (middle, high)
        )
    return high
