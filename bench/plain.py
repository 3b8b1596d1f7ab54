"""Greedy answers by plain `model.generate`, in fixed batches of questions in their own order, as most scripts do it.

    python bench/plain.py base 64 rows.jsonl       # the policy, questions in a batch, where the graded rows go

Prints the seconds of generating. For bench/lm_eval.py, which runs it in a folder with the same questions as the others.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from common import generate_plainly, plain_batches

from stages.policy.request import Request, end_ids
from stages.run.files import read_jsonl, write_jsonl
from stages.run.params import load_params
from stages.run.paths import PLATINUM
from stages.run.process import prepare_process
from stages.run.rounds import adapter_of
from stages.text.prompts import prompt_ids
from stages.text.verdict import verdict


def main() -> None:
    """Complete, grade, write."""
    policy, size, out = sys.argv[1:]
    prepare_process()  # before torch is imported
    from stages.policy.adapter import load_policy

    model, tokenizer = load_policy(adapter_of(policy))
    params = load_params()
    problems = list(read_jsonl(PLATINUM))
    requests = [
        Request(
            one["id"],
            tuple(prompt_ids(tokenizer, params.prompt, one["question"])),
            params.evaluate.max_new_tokens,
        )
        for one in problems
    ]
    ends, texts = end_ids(tokenizer, model.generation_config), []
    started = time.perf_counter()
    for batch in plain_batches(requests, int(size)):
        for tokens in generate_plainly(model, batch, tokenizer.pad_token_id, ends):
            texts.append(params.prompt.opening + tokenizer.decode(tokens, skip_special_tokens=True))
    print(time.perf_counter() - started)
    rows = zip(problems, texts, strict=True)
    write_jsonl(Path(out), ({**one, **verdict(text, one["gold"], one["question"])} for one, text in rows))


if __name__ == "__main__":
    main()
