"""Answers, family 5: every published verdict is reproduced, every gold parses, at the promised speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stages.text.answers import gold_answer, read_answer, same_answer

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared GSM8K files are not on this machine")


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


@needs_data
def test_all_published_verdicts() -> None:
    solutions = rows("gsm8k/example_model_solutions.jsonl")
    assert len(solutions) == 1319
    for row in solutions:
        for model in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
            answer = read_answer(row[model]["solution"], row["question"]).answer
            assert same_answer(answer, gold_answer(row["ground_truth"])) == row[model]["is_correct"]


@needs_data
def test_abel_sample() -> None:
    for row in rows("abel_001_sample/abel_13b.jsonl"):
        reading = read_answer(row["completion"], row["question"])
        assert same_answer(reading.answer, gold_answer(row["gold"])) == row["correct"], row["id"]
        assert not reading.leak


@needs_data
@pytest.mark.parametrize("name", ["gsm8k/train.jsonl", "gsm8k/test.jsonl", "gsm8k_platinum/test.jsonl"])
def test_every_gold_parses(name: str) -> None:
    for row in rows(name):
        reading = read_answer(row["answer"], row["question"])
        stated = row["answer"].split("####")[1].replace(",", "").strip()
        assert reading.answer == gold_answer(row["answer"]) == stated
        assert (reading.found, reading.leak) == (1, False)
