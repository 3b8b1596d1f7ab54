"""Statistics of the test sets beside Platinum (`data.tests`), each by itself; its questions have greedy answers only.

A row of `data/tests_eval/<policy>.jsonl` is one of `data/platinum_eval/<policy>.jsonl` with the name of its `test`.
"""

from __future__ import annotations

from collections.abc import Iterable

from stages.stats.one import Row, summarise

KEYS = (
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "flexible",
    "truncated",
    "leak",
    "no_answer",
    "questions",
)


def by_test(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each test set, in the order of the profile."""
    sets: dict[str, list[Row]] = {}
    for row in rows:
        sets.setdefault(row["test"], []).append(row)
    return sets


def metrics_of_tests(rows: Iterable[Row], seed: int) -> dict[str, dict[str, dict[str, float | int]]]:
    """`{"tests": {"svamp": {"accuracy": ...}}}`, the figures named as those of Platinum; nothing without test sets."""
    sets = by_test(rows)
    if not sets:
        return {}
    found = {name: summarise(rows_of_one, seed) for name, rows_of_one in sets.items()}
    return {"tests": {name: {key: values[key] for key in KEYS} for name, values in found.items()}}
