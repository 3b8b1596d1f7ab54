"""The verdict on a completion: the answer read from it, and whether that answer is the gold one."""

from __future__ import annotations

from typing import Any

from stages.text.answers import read_answer, same_answer


def verdict(
    completion: str, gold: str, question: str | None, tokens: int | None = None, finish: str | None = None
) -> dict[str, Any]:
    """The fields of a graded row, in the order of data/platinum_eval/<policy>.jsonl.

    They are completion, answer, correct, flexible_answer, flexible_correct, tokens and finish (if known), leak and
    answers_found. `gold` is a canonical number; `question` (if known) helps to recognise a repeated prompt.
    """
    reading = read_answer(completion, question)
    return {
        "completion": completion,
        "answer": reading.answer,
        "correct": same_answer(reading.answer, gold),
        "flexible_answer": reading.flexible_answer,
        "flexible_correct": same_answer(reading.flexible_answer, gold),
        **({} if tokens is None else {"tokens": tokens}),
        **({} if finish is None else {"finish": finish}),
        "leak": reading.leak,
        "answers_found": reading.found,
    }


def sample_verdict(completion: str, gold: str, question: str | None) -> dict[str, Any]:
    """The fields of one of several samples: completion, answer and correct."""
    answer = read_answer(completion, question).answer
    return {"completion": completion, "answer": answer, "correct": same_answer(answer, gold)}
