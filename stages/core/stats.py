"""The statistics of the evaluation: rates with intervals, paired comparisons, and the words for them.

A *row* is one line of `data/platinum_eval/<policy>.jsonl`. Rates are between 0 and 1, never rounded.
docs/evaluation.md says in plain words what each number means.
"""

from __future__ import annotations

import itertools
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, comb, lcm, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.core.errors import UserError

Row = Mapping[str, Any]
Floats = NDArray[np.float64]

ALPHA = 0.05
POWER = 0.8
RESAMPLES = 10_000
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
    # At the ends the formula gives exactly 0 or 1 but for the last bit.
    return (0.0 if successes == 0 else middle - half), (1.0 if successes == trials else middle + half)


def bootstrap_means(values: Sequence[float] | Floats, seed: int, resamples: int = RESAMPLES) -> Floats:
    """Means of `resamples` samples with replacement of one value a question; shape (resamples,).

    The mean depends only on how often each distinct value was drawn, and those counts are multinomial:
    drawing the counts is the same bootstrap, at a cost that does not grow with the number of questions.
    Raises ValueError without values.
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

    `values` holds one number a question, so that samples of one question, which are not independent,
    stay together. Give it paired differences for the interval of a difference.
    """
    tail = 50 * (1 - confidence)
    low, high = np.percentile(bootstrap_means(values, seed, resamples), [tail, 100 - tail])
    return float(low), float(high)


# --- paired tests -------------------------------------------------------------------------------


def mcnemar_p(gained: int, lost: int) -> float:
    """Exact two-sided McNemar p: a coin thrown gained + lost times (McNemar 1947), in exact integers."""
    thrown = gained + lost
    term = tail = 1
    for i in range(min(gained, lost)):
        term = term * (thrown - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / 2**thrown)


def sign_flip_p(
    differences: Sequence[int] | NDArray[np.int64], seed: int = 0, resamples: int = 100_000
) -> float:
    """Two-sided p of the paired sign-flip permutation test on whole-number differences, one a question.

    If neither policy is better, each question's difference could as well have had the other sign
    (Fisher 1935). p is the share of all sign choices whose sum is at least as far from 0 as the one seen.
    The null distribution is built exactly, value by value; only when that would take more than about a
    second is it drawn `resamples` times instead, and p is then (1 + hits) / (1 + resamples).
    """
    data = np.abs(np.asarray(differences, dtype=np.int64))
    seen = abs(int(np.sum(np.asarray(differences, dtype=np.int64))))
    values, counts = np.unique(data[data > 0], return_counts=True)
    total = int((values * counts).sum())
    if total == 0:
        return 1.0
    if total * int(counts.sum()) > 500_000_000:
        rng = np.random.default_rng(seed)
        sums = np.zeros(resamples, dtype=np.int64)
        for value, count in zip(values, counts, strict=True):
            sums += value * (2 * rng.binomial(count, 0.5, size=resamples) - count)
        return float((1 + np.count_nonzero(np.abs(sums) >= seen)) / (1 + resamples))
    # probability[s] of the sum of the values kept positive being s; the signed sum is 2 s - total.
    probability = np.ones(1)
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        wider = np.zeros(probability.size + value * count)
        ways = 1
        for kept in range(count + 1):
            wider[kept * value : kept * value + probability.size] += probability * (ways / 2**count)
            ways = ways * (count - kept) // (kept + 1)
        probability = wider
    signed = np.abs(2 * np.arange(total + 1) - total)
    return min(1.0, float(probability[signed >= seen].sum()))


def smallest_visible_difference(
    pairs: int, discordance: float, power: float = POWER, alpha: float = ALPHA
) -> float | None:
    """The smallest true difference that an exact McNemar test of `pairs` questions sees with this power.

    Exact unconditional power (Duffy 1984, Biometrics 40:1005): the number of questions that change is
    Binomial(pairs, discordance), the losses among m changes are Binomial(m, (1 - d / discordance) / 2), and
    the test rejects when its p <= alpha; d is found by bisection. Connor (1987, Biometrics 43:207) has the
    normal approximation. Where even all changes going one way would be too few (an exact test needs six),
    the smallest d that would do if all changes were gains. None when no difference could be seen at all.
    """
    from scipy.special import bdtr, bdtrc

    # The most losses among m changes that still reject, -1 when none do; one more change adds at most one.
    most = np.full(pairs + 1, -1)
    for m in range(1, pairs + 1):
        most[m] = most[m - 1] + (bdtr(most[m - 1] + 1, m, 0.5) <= alpha / 2)

    def power_at(difference: float, rate: float) -> float:
        spread = 10 * sqrt(pairs * rate * (1 - rate)) + 10
        m = np.arange(max(0, int(pairs * rate - spread)), min(pairs, int(pairs * rate + spread)) + 1)
        weight = np.diff(bdtr(m, pairs, rate), prepend=bdtr(m[0] - 1, pairs, rate) if m[0] else 0.0)
        m, weight = m[most[m] >= 0], weight[most[m] >= 0]
        loss = (1 - difference / rate) / 2
        rejects = bdtr(most[m], m, loss) + bdtrc(m - most[m] - 1, m, loss)
        return float((weight * rejects).sum())

    def solve(of: Callable[[float], float], high: float) -> float:
        low = 0.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (low, middle) if of(middle) >= power else (middle, high)
        return high

    if discordance > 0 and power_at(discordance, discordance) >= power:
        return solve(lambda d: power_at(d, discordance), discordance)
    if pairs == 0 or power_at(1.0, 1.0) < power:
        return None
    return solve(lambda d: power_at(d, d), 1.0)


# --- samples ------------------------------------------------------------------------------------


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that k of the samples, drawn without replacement, hold a correct one (Chen et al. 2021)."""
    return 1 - comb(samples - correct, k) / comb(samples, k)


def pass_hat_k(samples: int, correct: int, k: int) -> float:
    """pass^k: chance that k of the samples, drawn without replacement, are all correct (Yao et al. 2024)."""
    return comb(correct, k) / comb(samples, k)


def _vote(sample: Row) -> Any:
    """What a sample votes for: equal numbers are one candidate however they are written; None is no vote."""
    if sample["correct"]:
        return True  # whatever was judged equal to the gold is one candidate
    answer = sample["answer"]
    if answer is None:
        return None
    try:
        return Fraction(str(answer).replace(",", "").strip("$% "))
    except (ValueError, ZeroDivisionError):
        return str(answer)


def majority(samples: Sequence[Row]) -> float:
    """maj@k of one question: 1 when the most frequent answer is correct; m tied answers get 1/m each.

    Samples without an answer do not vote; without any vote it is 0.
    """
    votes = Counter(vote for vote in map(_vote, samples) if vote is not None)
    if not votes:
        return 0.0
    top = max(votes.values())
    winners = [vote for vote, count in votes.items() if count == top]
    return sum(vote is True for vote in winners) / len(winners)


def agreement(samples: Sequence[Row]) -> float:
    """Share of the pairs of samples with the same answer (no answer agrees with none); 1 for one sample."""
    if len(samples) < 2:
        return 1.0
    votes = Counter(vote for vote in map(_vote, samples) if vote is not None)
    return sum(count * (count - 1) for count in votes.values()) / (len(samples) * (len(samples) - 1))


def _samples_of(row: Row) -> int:
    return len(row.get("samples") or ())


def _one_size(first: Mapping[int, Any]) -> int:
    """Samples a question, from the first id seen of each size; 0 for none. UserError when questions differ."""
    if len(first) > 1:
        most = max(first)
        size, odd = next((size, key) for size, key in first.items() if size != most)
        raise UserError(
            f"question {odd!r} has {size} samples "
            f"where another has {most}: every question needs the same number; evaluate again"
        )
    return next(iter(first))


def _right(row: Row) -> int:
    return sum(bool(sample["correct"]) for sample in row["samples"])


# --- one policy ---------------------------------------------------------------------------------


def repeats(text: str) -> bool:
    """True when the text was going round in circles as it ended.

    That is: its last 60 characters or more are one block (of up to 1,000 characters) written copy after
    copy, three copies long or longer; the first and last may be cut. Linear time: the periods of all endings
    come from the prefix function (Knuth, Morris & Pratt 1977) of the last 3,000 characters, reversed.
    """
    tail = text.rstrip()[-3000:][::-1]
    if (
        tail.find(tail[:40], 1) < 0
    ):  # in a loop, two thirds or more of the 60 characters come one copy earlier
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


def _interval_keys(name: str, value: float, interval: tuple[float, float]) -> dict[str, float]:
    return {name: value, f"{name}_low": interval[0], f"{name}_high": interval[1]}


class Summary:
    """The metrics of one policy, counted row by row: a log of any length needs little memory.

    What grows is 20 bytes for each question with samples, and one counter for each length in tokens.
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
        size = _samples_of(row)
        self.sizes.setdefault(size, row.get("id"))
        if size:
            self.right.append(_right(row))
            self.majority.append(majority(row["samples"]))
            self.agreement.append(agreement(row["samples"]))

    def update(self, other: Summary) -> None:
        """Add what another summary counted in the rows after this one's."""
        self.counts.update(other.counts)
        self.tokens.update(other.tokens)
        for size, first in other.sizes.items():
            self.sizes.setdefault(size, first)
        self.right += other.right
        self.majority += other.majority
        self.agreement += other.agreement

    def metrics(self, seed: int) -> dict[str, float | int]:
        """One flat dict, nothing rounded; see `summarise`."""
        n = self.counts["questions"]
        if not n:
            raise UserError("nothing to summarise: the evaluation has no rows")
        out: dict[str, float | int] = {}
        for name, field in (("accuracy", "correct"), ("flexible", "flexible_correct")):
            right = self.counts[field]
            out |= _interval_keys(name, right / n, wilson(right, n))
        k = _one_size(self.sizes)
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
                out |= _interval_keys(name, float(np.mean(values)), bootstrap_interval(values, seed))
        # How they ended and how long they are is said only when every row tells.
        if self.counts["finish"] == n:
            for name in ("end_token", "truncated"):
                out |= _interval_keys(name, self.counts[name] / n, wilson(self.counts[name], n))
        for name in ("leak", "second_answer", "no_answer", "empty", "repeats"):
            out |= _interval_keys(name, self.counts[name] / n, wilson(self.counts[name], n))
        if self.tokens.total() == n:
            out["tokens_mean"] = sum(length * count for length, count in self.tokens.items()) / n
            out["tokens_p95"] = percentile(self.tokens, 95)
        return out | {"questions": n}


def percentile(counts: Mapping[int, int], percent: float) -> float:
    """The percentile of whole numbers, from how often each was seen: numpy's (linear), without the list."""
    values = sorted(counts)
    last = list(itertools.accumulate(counts[value] for value in values))  # rank + 1 of each value's last
    place = (last[-1] - 1) * (percent / 100)
    rank = int(place)
    low, high = (values[bisect_right(last, min(i, last[-1] - 1))] for i in (rank, rank + 1))
    share = place - rank
    # From the nearer end, as numpy rounds it.
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


def health_warnings(metrics: Mapping[str, Any], name: str) -> list[str]:
    """What is wrong with a policy's generations, in words; empty when leak and truncation are low."""
    checks = (
        (
            "leak",
            LEAK_LIMIT,
            "hold pieces of the prompt or of a next problem: the prompt or the stop tokens are wrong",
        ),
        ("truncated", TRUNCATED_LIMIT, "were cut at the token limit: raise evaluate.max_new_tokens"),
    )
    return [
        f"{name}: {metrics[key]:.1%} of the completions {words} (limit {limit:.0%})"
        for key, limit, words in checks
        if metrics.get(key, 0) > limit
    ]


# --- two policies -------------------------------------------------------------------------------


def p_words(p: float) -> str:
    """`p = 0.0031`, `p = 0.80`, `p < 0.0001`: two significant digits."""
    if p < 0.0001:
        return "p < 0.0001"
    return f"p = {p:.2f}" if p >= 0.1 else f"p = {p:.2g}"


def verdict(difference: float, p: float, visible: float | None, name_a: str, name_b: str) -> str:
    """What may be concluded from one paired test, in words; `visible` is the smallest visible difference."""
    if p < ALPHA and difference != 0:
        return f"{name_b if difference > 0 else name_a} is better ({p_words(p)})"
    if visible is None:
        return "no difference can be seen; with so few questions none could have been"
    return (
        f"no difference can be seen; one of at least {ceil(1000 * visible) / 10:.1f} points would have been"
    )


def _by_id(rows: Sequence[Row], name: str) -> dict[Any, Row]:
    index: dict[Any, Row] = {}
    for row in rows:
        if row["id"] in index:
            raise UserError(f"{name} has two rows with id {row['id']!r}: each question may be there once")
        index[row["id"]] = row
    return index


def compare(
    a_rows: Sequence[Row], b_rows: Sequence[Row], name_a: str = "A", name_b: str = "B", seed: int = 0
) -> dict[str, Any]:
    """The paired comparison of two evaluations of the same questions, joined by `id`; b minus a throughout.

    `verdict` speaks of greedy accuracy only (McNemar), `mean_verdict` of mean@k only (sign-flip test, present
    when both have samples): they answer different questions and may disagree. Rows found on one side only are
    counted (`only_a`, `only_b`) and left out. `smallest_visible` is what a test with as many changed
    questions as were seen would have shown in four of five repetitions.
    Raises UserError for a doubled id, or when no id is shared.
    """
    a_index, b_index = _by_id(a_rows, name_a), _by_id(b_rows, name_b)
    shared = [key for key in a_index if key in b_index]
    if not shared:
        raise UserError(f"{name_a} and {name_b} share no question id: there is nothing to pair")
    pairs = [(a_index[key], b_index[key]) for key in shared]
    sides = []
    for index, rows in ((a_index, [a for a, _ in pairs]), (b_index, [b for _, b in pairs])):
        first: dict[int, Any] = {}
        for row in rows:
            first.setdefault(_samples_of(row), row["id"])
        k = _one_size(first)
        right = np.array([_right(row) for row in rows], dtype=np.int64) if k else None
        correct = np.array([bool(row["correct"]) for row in rows])
        sides.append(Side(correct, len(index) - len(shared), k, right))
    same = sum(a.get("completion") == b.get("completion") is not None for a, b in pairs)
    return compare_sides(sides[0], sides[1], same, name_a, name_b, seed)


@dataclass(frozen=True)
class Side:
    """One policy in a paired comparison: a value a shared question, in the same order on both sides."""

    correct: NDArray[np.bool_]  # of the greedy answer
    alone: int  # questions that the other side lacks
    samples: int  # a question; 0 when none were drawn
    right: NDArray[np.int64] | None  # correct samples of each question; None without samples


def compare_sides(
    a: Side, b: Side, identical: int | None, name_a: str = "A", name_b: str = "B", seed: int = 0
) -> dict[str, Any]:
    """As `compare`, from the verdicts alone; `identical` completions are None when they cannot be known."""
    n = len(a.correct)
    changes = b.correct.astype(np.int64) - a.correct
    gained, lost = int((changes == 1).sum()), int((changes == -1).sum())
    p = mcnemar_p(gained, lost)
    visible = smallest_visible_difference(n, (gained + lost) / n)
    out: dict[str, Any] = {
        "questions": n,
        "only_a": a.alone,
        "only_b": b.alone,
        "accuracy_a": int(a.correct.sum()) / n,
        "accuracy_b": int(b.correct.sum()) / n,
        **_interval_keys(
            "difference", (gained - lost) / n, bootstrap_interval(changes.astype(np.float64), seed)
        ),
        "p": p,
        "gained": gained,
        "lost": lost,
        "identical_completions": identical,
        "smallest_visible": visible,
        "verdict": verdict((gained - lost) / n, p, visible, name_a, name_b),
    }
    if a.right is None or b.right is None:
        return out
    unit = lcm(a.samples, b.samples)
    steps = b.right * (unit // b.samples) - a.right * (unit // a.samples)
    mean_p = sign_flip_p(steps, seed)
    difference = float(steps.sum() / (unit * n))
    # Normal approximation: (z of a two-sided alpha + z of the power) standard errors.
    z = NormalDist().inv_cdf(1 - ALPHA / 2) + NormalDist().inv_cdf(POWER)
    mean_visible = z * float(np.std(steps / unit)) / sqrt(n) or None
    return out | {
        "samples_a": a.samples,
        "samples_b": b.samples,
        "mean_a": int(a.right.sum()) / (a.samples * n),
        "mean_b": int(b.right.sum()) / (b.samples * n),
        **_interval_keys("mean_difference", difference, bootstrap_interval(steps / unit, seed)),
        "mean_p": mean_p,
        "mean_smallest_visible": mean_visible,
        "mean_verdict": verdict(difference, mean_p, mean_visible, name_a, name_b)
        if steps.any()
        else "no difference can be seen: every question scored the same",
    }
