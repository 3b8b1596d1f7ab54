"""Graded rows as an evaluation writes them, for tests of the statistics and of the tools that show them."""

from __future__ import annotations

from typing import Any


def row(i: int, correct: bool, samples: list[bool] | None = None, **over: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "id": f"q{i}", "question": f"How many are {i}?", "gold": "1", "answer": str(int(correct)), "correct": correct,
        "completion": f"It is {int(correct)} of {i}. #### {int(correct)}", "flexible_answer": str(int(correct)),
        "flexible_correct": correct, "tokens": 10 + i % 7, "finish": "stop", "leak": False, "answers_found": 1,
    }  # fmt: skip
    if samples is not None:
        made["samples"] = [
            {"answer": "1" if good else f"{j + 2}", "correct": good} for j, good in enumerate(samples)
        ]
    return made | over


def policies(
    gained: int, lost: int, both: int, neither: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    kinds = (
        [(False, True)] * gained + [(True, False)] * lost + [(True, True)] * both + [(False, False)] * neither
    )
    return [row(i, a) for i, (a, _) in enumerate(kinds)], [row(i, b) for i, (_, b) in enumerate(kinds)]
