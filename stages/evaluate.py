"""Evaluation on GSM8K Platinum: one greedy completion a question, and `evaluate.samples` drawn ones.

A row of data/platinum_eval/<policy>.jsonl:

    {"id": "platinum-00003", "question": "...", "gold": "10", "completion": "... #### 10", "answer": "10",
     "correct": true, "flexible_answer": "10", "flexible_correct": true, "tokens": 41, "finish": "stop",
     "leak": false, "answers_found": 1, "samples": [{"completion": "...", "answer": "10", "correct": true, ...}]}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.core.answers import read_answer, same_answer
from stages.core.generation import complete
from stages.core.launch import fix_arithmetic
from stages.core.paths import ADAPTERS, BASE
from stages.core.policy import load_tokenizer
from stages.core.prompts import prompt_ids
from stages.core.records import read_jsonl, write_json, write_jsonl
from stages.core.stage import stage_run
from stages.core.stats import summarise
from stages.engine.base import Request, request_seed
from stages.engine.choose import open_engine

PLATINUM = Path("data/gsm8k/platinum.jsonl")


def main(policy: str) -> None:
    """Evaluate one policy: `base`, `sft` or `dpo`."""
    adapter = ADAPTERS[policy]
    rows_file, metrics_file = (
        Path(f"data/platinum_eval/{policy}.jsonl"),
        Path(f"metrics/platinum/{policy}.json"),
    )
    details_file = Path(f"metrics/platinum_details/{policy}.json")
    with stage_run(
        "evaluate",
        variant=policy,
        sections=("evaluate", "prompt", "seed"),
        inputs=[PLATINUM, BASE, *([adapter] if adapter else [])],
        outputs=[rows_file, metrics_file, details_file],
    ) as run:
        spec, seed = run.params.evaluate, run.params.seed
        fix_arithmetic(run.params.hardware.threads, seed)
        problems = list(read_jsonl(PLATINUM, {"id": str, "question": str, "gold": str}))

        # One request for the greedy answer, one for each sample.
        tokenizer = load_tokenizer()
        requests = []
        for problem in problems:
            prompt = tuple(prompt_ids(tokenizer, run.params.prompt, problem["question"]))
            requests.append(Request(f"{problem['id']}/greedy", prompt, spec.max_new_tokens))
            for k in range(spec.samples):
                own_seed = request_seed(seed, "evaluate", problem["id"], str(k))
                sample = Request(
                    f"{problem['id']}/{k}",
                    prompt,
                    spec.max_new_tokens,
                    spec.temperature,
                    spec.top_p,
                    own_seed,
                )
                requests.append(sample)

        # Generation, journalled.
        with run.journal() as journal:
            done = sum(request.id in journal.records for request in requests)
            with (
                open_engine(adapter, run.params.hardware) as engine,
                run.progress("generating", len(requests), "completions", done) as advance,
            ):
                opening = run.params.prompt.opening
                completions = complete(engine, tokenizer, requests, journal, advance, opening)

        # Verdicts and metrics.
        rows = [_row(problem, completions, spec.samples) for problem in problems]
        write_jsonl(rows_file, rows)
        metrics = summarise(rows, seed)
        write_json(details_file, metrics)
        write_json(metrics_file, {name: metrics[name] for name in headline_names(spec.samples)})
        run.say(f"{metrics['accuracy']:.1%} of {len(rows):,} questions answered right")


def headline_names(samples: int) -> list[str]:
    """The few metrics that `dvc metrics show` prints as a table; all others are in metrics/platinum_details/."""
    drawn = [f"mean_at_{samples}", f"maj_at_{samples}", f"pass_at_{samples}"] if samples else []
    return ["accuracy", "accuracy_low", "accuracy_high", "flexible", *drawn, "truncated", "leak"]


def _row(problem: dict[str, Any], completions: dict[str, dict[str, Any]], samples: int) -> dict[str, Any]:
    greedy = completions[f"{problem['id']}/greedy"]
    gold = problem["gold"]
    reading = read_answer(greedy["text"], problem["question"])
    row = {
        "id": problem["id"],
        "question": problem["question"],
        "gold": gold,
        "completion": greedy["text"],
        "answer": reading.answer,
        "correct": same_answer(reading.answer, gold),
        "flexible_answer": reading.flexible_answer,
        "flexible_correct": same_answer(reading.flexible_answer, gold),
        "tokens": greedy["tokens"],
        "finish": greedy["finish"],
        "leak": reading.leak,
        "answers_found": reading.found,
    }
    if samples:
        row["samples"] = [_sample(completions[f"{problem['id']}/{k}"], problem) for k in range(samples)]
    return row


def _sample(drawn: dict[str, Any], problem: dict[str, Any]) -> dict[str, Any]:
    answer = read_answer(drawn["text"], problem["question"]).answer
    return {
        "completion": drawn["text"],
        "answer": answer,
        "correct": same_answer(answer, problem["gold"]),
        "tokens": drawn["tokens"],
        "finish": drawn["finish"],
    }
