"""Paired comparison of two policies on the same questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, lcm, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.run.errors import UserError
from stages.stats.changed import questions_right, twins_right
from stages.stats.one import Row, bootstrap_interval, count_right, interval_keys, one_size, samples_of
from stages.stats.p_value import mcnemar_p, p_words, sign_flip_p
from stages.stats.testsets import by_test

ALPHA = 0.05
POWER = 0.8
SHARES = 720_720  # divides by every number up to 16
STEP_KEYS = ("difference", "difference_low", "difference_high", "p", "smallest_visible", "verdict")
SAME = "no difference can be seen: every question scored the same"


def smallest_visible_difference(
    pairs: int, discordance: float, power: float = POWER, alpha: float = ALPHA
) -> float | None:
    """The smallest true difference that an exact McNemar test of `pairs` questions sees with this power.

    The power is exact and unconditional (Duffy 1984, Biometrics 40:1005): the number of questions that change is
    Binomial(pairs, discordance), the losses among m changes are Binomial(m, (1 - d / discordance) / 2), and the test
    rejects when its p <= alpha. The difference d is found by bisection. Connor (1987, Biometrics 43:207) gives the
    normal approximation.

    The test needs six changes to reject at all. When even changes that all go one way would be too few, the result is
    the smallest d that would be seen if all changes were gains. None when no difference could be seen.
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


def conclusion(difference: float, p: float, visible: float | None, name_a: str, name_b: str) -> str:
    """What may be concluded from one paired test, in words. `visible` is the smallest visible difference."""
    if p < ALPHA and difference != 0:
        return f"{name_b if difference > 0 else name_a} is better ({p_words(p)})"
    if visible is None:
        return "no difference can be seen; with so few questions none could have been"
    return (
        f"no difference can be seen; one of at least {ceil(1000 * visible) / 10:.1f} points would have been"
    )


def paired_rates(
    before: Sequence[float] | NDArray[np.float64],
    after: Sequence[float] | NDArray[np.float64],
    names: tuple[str, str],
    seed: int = 0,
) -> dict[str, Any]:
    """The paired difference of two rates: `after` minus `before`, one value in [0, 1] for each question.

    The values are shares 1/m of a question (a tie of m answers). `p` is that of the sign-flip test, which is exact for
    up to 16 tied answers. Keys: difference (with _low, _high), p, smallest_visible, verdict.
    """
    changes = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    steps = np.rint(changes * SHARES).astype(np.int64)
    p = sign_flip_p(steps // max(1, int(np.gcd.reduce(steps))), seed)
    difference = float(changes.mean())
    visible = _visible(changes)
    return {
        **interval_keys("difference", difference, bootstrap_interval(changes, seed)),
        "p": p,
        "smallest_visible": visible,
        "verdict": conclusion(difference, p, visible, *names) if steps.any() else SAME,
    }


def _visible(changes: NDArray[np.float64]) -> float | None:
    """The smallest visible mean difference, by the normal approximation; None when no question changed."""
    # (z of a two-sided alpha + z of the power) standard errors.
    z = NormalDist().inv_cdf(1 - ALPHA / 2) + NormalDist().inv_cdf(POWER)
    return z * float(np.std(changes)) / sqrt(len(changes)) or None


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
    """The paired comparison of two evaluations of the same questions, joined by `id`. Differences are b minus a.

    `verdict` is about greedy accuracy (McNemar). `mean_verdict` is about mean@k (sign-flip test) and is there when both
    have samples. The two answer different questions and may disagree. Rows found on one side only are left out and
    counted (`only_a`, `only_b`). `smallest_visible` is the difference that a test with as many changed questions as
    were seen would have shown in four of five repetitions. Raises UserError for a doubled id, or when no id is shared.
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
            first.setdefault(samples_of(row), row["id"])
        k = one_size(first)
        right = np.array([count_right(row) for row in rows], dtype=np.int64) if k else None
        correct = np.array([bool(row["correct"]) for row in rows])
        sides.append(Side(correct, len(index) - len(shared), k, right))
    same = sum(a.get("completion") == b.get("completion") is not None for a, b in pairs)
    return compare_sides(sides[0], sides[1], same, name_a, name_b, seed)


@dataclass(frozen=True)
class Side:
    """One policy in a paired comparison. Its arrays hold one value for each shared question, in the same order."""

    correct: NDArray[np.bool_]  # of the greedy answer
    alone: int  # questions that the other side lacks
    samples: int  # a question; 0 when none were drawn
    right: NDArray[np.int64] | None  # correct samples of each question; None without samples


def compare_sides(
    a: Side, b: Side, identical: int | None, name_a: str = "A", name_b: str = "B", seed: int = 0
) -> dict[str, Any]:
    """As `compare`, but from the verdicts alone. `identical` counts equal completions, None when that is not known."""
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
        **interval_keys(
            "difference", (gained - lost) / n, bootstrap_interval(changes.astype(np.float64), seed)
        ),
        "p": p,
        "gained": gained,
        "lost": lost,
        "identical_completions": identical,
        "smallest_visible": visible,
        "verdict": conclusion((gained - lost) / n, p, visible, name_a, name_b),
    }
    if a.right is None or b.right is None:
        return out
    unit = lcm(a.samples, b.samples)
    steps = b.right * (unit // b.samples) - a.right * (unit // a.samples)
    mean_p = sign_flip_p(steps, seed)
    difference = float(steps.sum() / (unit * n))
    mean_visible = _visible(steps / unit)
    return out | {
        "samples_a": a.samples,
        "samples_b": b.samples,
        "mean_a": int(a.right.sum()) / (a.samples * n),
        "mean_b": int(b.right.sum()) / (b.samples * n),
        **interval_keys("mean_difference", difference, bootstrap_interval(steps / unit, seed)),
        "mean_p": mean_p,
        "mean_smallest_visible": mean_visible,
        "mean_verdict": conclusion(difference, mean_p, mean_visible, name_a, name_b) if steps.any() else SAME,
    }


def compare_changed(
    a_rows: Sequence[Row], b_rows: Sequence[Row], names: tuple[str, str], seed: int
) -> dict[str, dict[str, Any]]:
    """The paired comparison of two policies, b minus a, by `changed` and by `both`; nothing without shared twins.

    With one twin a question `p` is that of the exact McNemar test, with several that of the sign-flip test, which is
    the same for shares of a question.
    """
    index = {row["id"]: row for row in a_rows if row.get("twins")}
    pairs = [(index[row["id"]], row) for row in b_rows if row.get("twins") and row["id"] in index]
    pairs = [
        (a, b) for a, b in pairs if [twin["id"] for twin in a["twins"]] == [twin["id"] for twin in b["twins"]]
    ]
    if not pairs:
        return {}
    single = all(len(a["twins"]) == 1 for a, _ in pairs)
    found = []
    for rows in ([a for a, _ in pairs], [b for _, b in pairs]):
        twins = twins_right(rows)
        found.append({"changed": twins, "both": questions_right(rows) * twins})
    out = {}
    for name in ("changed", "both"):
        before, after = found[0][name], found[1][name]
        if single:
            compared = compare_sides(
                Side(before > 0, 0, 0, None), Side(after > 0, 0, 0, None), None, *names, seed
            )
        else:
            compared = paired_rates(before, after, names, seed)
        out[name] = {"questions": len(pairs), **{key: compared[key] for key in STEP_KEYS}}
    return out


def compare_tests(
    a_rows: Sequence[Row], b_rows: Sequence[Row], names: tuple[str, str], seed: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """The paired comparison of two policies, b minus a, on each test set that both answered; nothing without one.

    `{"tests": {"svamp": {...}}}`; `p` is that of the exact McNemar test.
    """
    first, second = by_test(a_rows), by_test(b_rows)
    keys = ("questions", "accuracy_a", "accuracy_b", "gained", "lost", *STEP_KEYS)
    found = {name: compare(first[name], rows, *names, seed) for name, rows in second.items() if name in first}
    return {"tests": {name: {key: one[key] for key in keys} for name, one in found.items()}} if found else {}


def compare_votes(
    a_rows: Sequence[Row], b_rows: Sequence[Row], names: tuple[str, str], seed: int
) -> dict[str, dict[str, Any]]:
    """The paired comparison of two policies, b minus a, by coherent@k; nothing without questions that both voted on.

    `{"coherent": {...}}`; a row is one of `data/votes/<policy>.jsonl`, and `p` is that of the sign-flip test.
    """
    before = {row["id"]: row["coherent"] for row in a_rows}
    pairs = [(before[row["id"]], row["coherent"]) for row in b_rows if row["id"] in before]
    if not pairs:
        return {}
    compared = paired_rates([a for a, _ in pairs], [b for _, b in pairs], names, seed)
    return {"coherent": {"questions": len(pairs), **compared}}
