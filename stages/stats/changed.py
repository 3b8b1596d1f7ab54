"""Statistics of changed questions: does a policy still answer right when one number of the question is another one?

A row of `data/platinum_eval/<policy>.jsonl` holds the `twins` of its question, perhaps none. Each question with twins
counts once: several twins of one (`data.changed: all`) are averaged first. docs/changed-questions.md has the names.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stages.stats.one import Floats, Row, bootstrap_interval, interval_keys, wilson


def changed_metrics(rows: Sequence[Row], seed: int) -> dict[str, float | int]:
    """What a policy makes of the twins, each rate with `_low` and `_high`; nothing when there are none.

    `changed`, `both` and `kept` have Wilson intervals when each question has one twin. Otherwise, and for the drop,
    whole questions are resampled. `kept` is left out when no question was answered right.
    """
    asked = [row for row in rows if row.get("twins")]
    if not asked:
        return {}
    right, twins = questions_right(asked), twins_right(asked)
    shares = {"changed": twins, "both": right * twins}
    if right.any():
        shares["kept"] = twins[right > 0]
    single = all(len(row["twins"]) == 1 for row in asked)
    out: dict[str, float | int] = {}
    for name, values in shares.items():
        interval = wilson(int(values.sum()), len(values)) if single else bootstrap_interval(values, seed)
        out |= interval_keys(name, float(values.mean()), interval)
    drop = right - twins
    return {
        **out,
        "unchanged": float(right.mean()),
        **interval_keys("changed_drop", float(drop.mean()), bootstrap_interval(drop, seed)),
        "changed_questions": len(asked),
        "changed_twins": sum(len(row["twins"]) for row in asked),
    }


def questions_right(rows: Sequence[Row]) -> Floats:
    """1 for each question that is answered right, else 0."""
    return np.array([float(bool(row["correct"])) for row in rows])


def twins_right(rows: Sequence[Row]) -> Floats:
    """The share of each question's twins that are answered right."""
    return np.array([np.mean([bool(twin["correct"]) for twin in row["twins"]]) for row in rows])
