"""Is a gold label wrong? Trajectories that agree, soundly, on another answer are evidence.

answers and counterfactuals of eight trajectories, gold 12:   six times 15 with one and the same
(18, 17, 14), once 15 by another way, once 12    ->   suspicion (6 - 1) / 8 = 0.625 for the answer 15
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from stages.regime_w.signals import Reasoning


def suspicion(reasonings: Sequence[Reasoning], correct: Sequence[bool]) -> tuple[float, str | None]:
    """How suspect a question's gold is, in [0, 1], and the answer that speaks against it (None at 0).

    max(0, n - g) / K, where n of the K trajectories have one answer that is not the gold's, every equation it rests
    on holds, and it moves alike in all of them when a number of the question changes; g have the gold's answer.
    A single trajectory agrees with nobody: n of 1 counts as 0.
    """
    classes = Counter(
        (reasoning.answer, reasoning.counterfactuals)
        for reasoning, right in zip(reasonings, correct, strict=True)
        if not right and reasoning.answer is not None and None not in reasoning.counterfactuals
    )
    if not classes:
        return 0.0, None
    (answer, _), size = max(classes.items(), key=lambda item: item[1])
    score = (size - sum(correct)) / len(reasonings)
    return (score, answer) if size > 1 and score > 0 else (0.0, None)
