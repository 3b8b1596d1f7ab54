"""Preference pairs as the tokens that DPO trains on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.run.files import read_jsonl
from stages.run.params import Prompt
from stages.text.prompts import completion_ids, prompt_ids


def build_rows(
    pairs: Path, max_tokens: int, prompt: Prompt, tokenizer: Any
) -> tuple[list[dict[str, list[int]]], int]:
    """The pairs of a file as tokens (`prompt_ids`, `chosen_ids`, `rejected_ids`), and how many were too long.

    A rejected text that was cut off gets no end token, because the policy never wrote one.
    """
    rows, too_long = [], 0
    for pair in read_jsonl(pairs, {"prompt": str, "chosen": str, "rejected": str}):
        row = {
            "prompt_ids": prompt_ids(tokenizer, prompt, pair["prompt"]),
            "chosen_ids": completion_ids(tokenizer, pair["chosen"], opening=prompt.opening),
            "rejected_ids": completion_ids(
                tokenizer, pair["rejected"], pair.get("rejected_finish") != "length", prompt.opening
            ),
        }
        if pair_length(row) > max_tokens:
            too_long += 1
        else:
            rows.append(row)
    return rows, too_long


def pair_length(row: Mapping[str, list[int]]) -> int:
    """Tokens of a pair's longer side, the prompt included."""
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
