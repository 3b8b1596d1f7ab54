"""The tests behind every p-value, and how a p-value is written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def mcnemar_p(gained: int, lost: int) -> float:
    """Exact two-sided McNemar p (McNemar 1947): how often a fair coin falls as unevenly, in exact integers."""
    thrown = gained + lost
    term = tail = 1
    for i in range(min(gained, lost)):
        term = term * (thrown - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / 2**thrown)


def sign_flip_p(
    differences: Sequence[int] | NDArray[np.int64],
    seed: int = 0,
    resamples: int = 100_000,
    one_sided: bool = False,
) -> float:
    """p of the paired sign-flip permutation test. There is one whole-number difference for each question.

    If neither policy is better, each question's difference could as well have had the other sign (Fisher 1935). p is
    the share of all choices of signs whose sum is at least as far from 0 as the sum seen; `one_sided`, at least as
    large. The null distribution is built exactly, value by value. Where that would take more than about a second,
    `resamples` sums are drawn instead, and p is (1 + hits) / (1 + resamples).
    """
    data = np.abs(np.asarray(differences, dtype=np.int64))
    seen = int(np.sum(np.asarray(differences, dtype=np.int64)))
    values, counts = np.unique(data[data > 0], return_counts=True)
    total = int((values * counts).sum())
    if total == 0:
        return 1.0
    if total * int(counts.sum()) > 500_000_000:
        rng = np.random.default_rng(seed)
        sums = np.zeros(resamples, dtype=np.int64)
        for value, count in zip(values, counts, strict=True):
            sums += value * (2 * rng.binomial(count, 0.5, size=resamples) - count)
        hits = np.count_nonzero(sums >= seen if one_sided else np.abs(sums) >= abs(seen))
        return float((1 + hits) / (1 + resamples))
    # probability[s] of the sum of the values kept positive being s; the signed sum is 2 s - total.
    probability = np.ones(1)
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        wider = np.zeros(probability.size + value * count)
        ways = 1
        for kept in range(count + 1):
            wider[kept * value : kept * value + probability.size] += probability * (ways / 2**count)
            ways = ways * (count - kept) // (kept + 1)
        probability = wider
    signed = 2 * np.arange(total + 1) - total
    return min(1.0, float(probability[signed >= seen if one_sided else np.abs(signed) >= abs(seen)].sum()))


def p_words(p: float) -> str:
    """`p = 0.0031`, `p = 0.80`, `p < 0.0001`: two significant digits."""
    if p < 0.0001:
        return "p < 0.0001"
    return f"p = {p:.2f}" if p >= 0.1 else f"p = {p:.2g}"
