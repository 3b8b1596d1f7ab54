"""Statistics of one policy: rates with their intervals, samples, and the health of its completions.

A *row* is one line of `data/platinum_eval/<policy>.jsonl`. Rates are between 0 and 1, never rounded.
docs/evaluation.md says in plain words what each number means.
"""

from __future__ import annotations

import itertools
import re
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from math import comb, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.run.errors import UserError

Row = Mapping[str, Any]
Floats = NDArray[np.float64]

RESAMPLES = 10_000
BOOTSTRAP_SEED = 0  # of the comparisons, and of logs from elsewhere
# Above these shares of the greedy completions the accuracy is more about the cut than about the model.
LEAK_LIMIT = 0.01
TRUNCATED_LIMIT = 0.05


# --- intervals ----------------------------------------------------------------------------------


def wilson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a proportion (Wilson 1927): inside [0, 1], and right also near 0 and 1.

    Raises ValueError when trials < 1 or successes is not in 0..trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"wilson: {successes} successes of {trials} trials")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / trials
    scale = 1 + z * z / trials
    middle = (rate + z * z / (2 * trials)) / scale
    half = z / scale * sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    # There the formula gives 0 or 1 exactly, up to rounding.
    return (0.0 if successes == 0 else middle - half), (1.0 if successes == trials else middle + half)


def bootstrap_means(values: Sequence[float] | Floats, seed: int, resamples: int = RESAMPLES) -> Floats:
    """The mean of each of `resamples` bootstrap samples; shape (resamples,).

    The mean depends only on how often each distinct value was drawn, and those counts are multinomial. Drawing the
    counts is therefore the same bootstrap, and its cost does not grow with the number of questions. Raises ValueError
    without values.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        raise ValueError("bootstrap: no values")
    distinct, counts = np.unique(data, return_counts=True)
    means = np.empty(resamples)
    rng = np.random.default_rng(seed)
    rows = max(1, 4_000_000 // distinct.size)  # keeps memory near 64 MB, whatever the number of values
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        drawn = rng.multinomial(data.size, counts / data.size, size=size)
        means[start : start + size] = (drawn * distinct).sum(axis=1) / data.size
    return means


def bootstrap_interval(
    values: Sequence[float] | Floats, seed: int, confidence: float = 0.95, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over questions (Efron & Tibshirani 1993, ch. 13).

    `values` holds one number for each question. Samples of one question are not independent, so whole questions are
    resampled. For the interval of a difference, give the paired differences.
    """
    tail = 50 * (1 - confidence)
    low, high = np.percentile(bootstrap_means(values, seed, resamples), [tail, 100 - tail])
    return float(low), float(high)


# --- samples ------------------------------------------------------------------------------------


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that k of the samples, drawn without replacement, hold a correct one (Chen et al. 2021)."""
    return 1 - comb(samples - correct, k) / comb(samples, k)


def pass_hat_k(samples: int, correct: int, k: int) -> float:
    """pass^k: chance that k of the samples, drawn without replacement, are all correct (Yao et al. 2024)."""
    return comb(correct, k) / comb(samples, k)


RIGHT = "right"  # what every right sample votes for; True would equal the number 1


def _vote(sample: Row) -> Any:
    """What a sample votes for. Equal numbers are one candidate however they are written. None is no vote."""
    if sample["correct"]:
        return RIGHT  # all answers that equal the gold are one candidate
    answer = sample["answer"]
    if answer is None:
        return None
    try:
        return Fraction(str(answer).replace(",", "").strip("$% "))
    except (ValueError, ZeroDivisionError):
        return f"'{answer}'"


def majority(samples: Sequence[Row]) -> float:
    """maj@k of one question: 1 when the most frequent answer is correct; m tied answers get 1/m each.

    Samples without an answer do not vote; without any vote it is 0.
    """
    return elected(votes_of(samples), [1] * len(samples))


def votes_of(samples: Sequence[Row]) -> list[Any]:
    """What each sample votes for: RIGHT, None without an answer, else something for each wrong answer."""
    return [_vote(sample) for sample in samples]


def elected(votes: Sequence[Any], weights: Sequence[float]) -> float:
    """As `majority`, where each vote counts its weight; sums that differ by rounding alone are tied."""
    sums: dict[Any, float] = {}
    for vote, weight in zip(votes, weights, strict=True):
        if vote is not None:
            sums[vote] = sums.get(vote, 0) + weight
    if len(sums) < 2:
        return float(RIGHT in sums)
    least = max(sums.values()) * (1 - 1e-9)
    winners = [vote for vote, weight in sums.items() if weight >= least]
    return (RIGHT in winners) / len(winners)


def agreement(samples: Sequence[Row]) -> float:
    """Share of the pairs of samples with the same answer (no answer agrees with none); 1 for one sample."""
    if len(samples) < 2:
        return 1.0
    votes = Counter(vote for vote in map(_vote, samples) if vote is not None)
    return sum(count * (count - 1) for count in votes.values()) / (len(samples) * (len(samples) - 1))


def samples_of(row: Row) -> int:
    """How many samples a row holds."""
    return len(row.get("samples") or ())


def one_size(first: Mapping[int, Any]) -> int:
    """How many samples each question has. `first` maps each number seen to the first question that has so many.

    Raises UserError when questions differ.
    """
    if len(first) > 1:
        most = max(first)
        size, odd = next((size, key) for size, key in first.items() if size != most)
        raise UserError(
            f"question {odd!r} has {size} samples "
            f"where another has {most}: every question needs the same number; evaluate again"
        )
    return next(iter(first))


def count_right(row: Row) -> int:
    """How many samples of a row are correct."""
    return sum(bool(sample["correct"]) for sample in row["samples"])


# --- one policy ---------------------------------------------------------------------------------


def repeats(text: str) -> bool:
    """True when the text ends in a loop.

    A loop is a block of up to 1,000 characters written again and again: at least 60 characters and three copies, of
    which the first and the last may be cut. The time is linear, because the periods of all endings come from the
    prefix function (Knuth, Morris & Pratt 1977) of the last 3,000 characters, reversed.
    """
    tail = text.rstrip()[-3000:][::-1]
    # Quick way out for nearly every text: in a loop, the last 40 characters stand one copy earlier as well.
    if tail.find(tail[:40], 1) < 0:
        return False
    border = [0] * len(tail)
    matched = 0
    for i in range(1, len(tail)):
        while matched and tail[i] != tail[matched]:
            matched = border[matched - 1]
        matched += tail[i] == tail[matched]
        border[i] = matched
        length = i + 1
        if length >= 60 and 3 * (length - matched) <= length:
            return True
    return False


def interval_keys(name: str, value: float, interval: tuple[float, float]) -> dict[str, float]:
    """A figure and its interval as they stand in a metrics file."""
    return {name: value, f"{name}_low": interval[0], f"{name}_high": interval[1]}


class Summary:
    """The metrics of one policy, counted row by row, so that a log of any length needs little memory.

    Memory grows by 20 bytes with each question that has samples, and by one counter with each new length in tokens.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.tokens: Counter[int] = Counter()
        self.sizes: dict[int, Any] = {}  # samples a question -> the first id that has so many
        self.right, self.majority, self.agreement = array("i"), array("d"), array("d")

    def add(self, row: Row) -> None:
        """Count one graded row; `tokens` and `finish` may be absent, and so may `id` and `samples`."""
        counts = self.counts
        counts["questions"] += 1
        counts["correct"] += bool(row["correct"])
        counts["flexible_correct"] += bool(row["flexible_correct"])
        counts["leak"] += bool(row["leak"])
        counts["second_answer"] += row["answers_found"] > 1
        counts["no_answer"] += row["answer"] is None
        counts["empty"] += not row["completion"].strip()
        counts["repeats"] += repeats(row["completion"])
        if "finish" in row:
            counts["finish"] += 1
            counts["end_token"] += row["finish"] == "stop"
            counts["truncated"] += row["finish"] == "length"
        if "tokens" in row:
            self.tokens[row["tokens"]] += 1
        size = samples_of(row)
        self.sizes.setdefault(size, row.get("id"))
        if size:
            self.right.append(count_right(row))
            self.majority.append(majority(row["samples"]))
            self.agreement.append(agreement(row["samples"]))

    def metrics(self, seed: int) -> dict[str, float | int]:
        """One flat dict, nothing rounded; see `summarise`."""
        n = self.counts["questions"]
        if not n:
            raise UserError("nothing to summarise: the evaluation has no rows")
        out: dict[str, float | int] = {}
        for name, field in (("accuracy", "correct"), ("flexible", "flexible_correct")):
            right = self.counts[field]
            out |= interval_keys(name, right / n, wilson(right, n))
        k = one_size(self.sizes)
        if k:
            per_question: dict[str, Sequence[float]] = {
                f"mean_at_{k}": [right / k for right in self.right],
                f"maj_at_{k}": self.majority,
                f"pass_at_{k}": [pass_at_k(k, right, k) for right in self.right],
                f"pass_hat_{k}": [pass_hat_k(k, right, k) for right in self.right],
                "agreement": self.agreement,
            }
            # Between one sample and all of them the unbiased estimate differs from a plain count.
            if k > 2:
                per_question[f"pass_at_{k // 2}"] = [pass_at_k(k, right, k // 2) for right in self.right]
            for name, values in per_question.items():
                out |= interval_keys(name, float(np.mean(values)), bootstrap_interval(values, seed))
        # Logs from elsewhere may lack `finish` or `tokens`. A rate over some rows would be taken for one over all.
        if self.counts["finish"] == n:
            for name in ("end_token", "truncated"):
                out |= interval_keys(name, self.counts[name] / n, wilson(self.counts[name], n))
        for name in ("leak", "second_answer", "no_answer", "empty", "repeats"):
            out |= interval_keys(name, self.counts[name] / n, wilson(self.counts[name], n))
        if self.tokens.total() == n:
            out["tokens_mean"] = sum(length * count for length, count in self.tokens.items()) / n
            out["tokens_p95"] = percentile(self.tokens, 95)
        return out | {"questions": n}


def percentile(counts: Mapping[int, int], percent: float) -> float:
    """The percentile of whole numbers, from how often each was seen. It equals numpy's (linear) to the last bit."""
    values = sorted(counts)
    last = list(
        itertools.accumulate(counts[value] for value in values)
    )  # how many are at or below each value
    place = (last[-1] - 1) * (percent / 100)
    rank = int(place)
    low, high = (values[bisect_right(last, min(i, last[-1] - 1))] for i in (rank, rank + 1))
    share = place - rank
    # numpy interpolates from the nearer end, which decides how the result is rounded.
    return low + (high - low) * share if share < 0.5 else high - (high - low) * (1 - share)


def summarise(rows: Iterable[Row], seed: int) -> dict[str, float | int]:
    """The metrics of one policy from its evaluated rows: one flat dict, nothing rounded.

    `accuracy`, `flexible` and the health, counted on the greedy completions, have Wilson intervals; mean,
    majority, pass and agreement of the samples have bootstrap intervals by question (`_low`, `_high`).
    Raises UserError when there are no rows, or when questions have different numbers of samples.
    """
    summary = Summary()
    for row in rows:
        summary.add(row)
    return summary.metrics(seed)


def samples_in(metrics: Mapping[str, Any]) -> int:
    """The k of `mean_at_k` in one policy's metrics; 0 when no samples were drawn."""
    return max((int(m[1]) for m in (re.fullmatch(r"mean_at_(\d+)", key) for key in metrics) if m), default=0)


def health_warnings(metrics: Mapping[str, Any], name: str) -> list[str]:
    """What is wrong with a policy's generations, in words; empty when few of them leak or are truncated.

    Those of the other test sets count by themselves.
    """
    checks = (
        (
            "leak",
            LEAK_LIMIT,
            "hold pieces of the prompt or of a next problem: the prompt or the stop tokens are wrong",
        ),
        ("truncated", TRUNCATED_LIMIT, "were cut at the token limit: raise evaluate.max_new_tokens"),
    )
    asked = {"": metrics, **{f" on {test}": values for test, values in metrics.get("tests", {}).items()}}
    return [
        f"{name}{where}: {values[key]:.1%} of the completions {words} (limit {limit:.0%})"
        for where, values in asked.items()
        for key, limit, words in checks
        if values.get(key, 0) > limit
    ]
