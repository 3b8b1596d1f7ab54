"""Evaluation on GSM8K Platinum: a greedy completion for each question and each twin, and `evaluate.samples` drawn ones.

A row of data/platinum_eval/<policy>.jsonl:

    {"id": "platinum-00003", "question": "...", "gold": "10", "completion": "... #### 10", "answer": "10",
     "correct": true, "flexible_answer": "10", "flexible_correct": true, "tokens": 41, "finish": "stop",
     "leak": false, "answers_found": 1,
     "twins": [{"id": "platinum-00003~2", "question": "...", "gold": "12", "completion": "... #### 12", "answer": "12",
                "correct": true, "tokens": 40, "finish": "stop"}],
     "samples": [{"completion": "...", "answer": "10", "correct": true, "tokens": 38, "finish": "stop",
                  "logprob": -3.1}]}

`twins` are the question's in data/gsm8k/changed.jsonl, perhaps none; with `data.changed: none` no row has the field.

`logprob` is the summed log-probability of the completion at temperature 1, as in data/rollouts/.

The questions of the other test sets (`data.tests`) are answered greedily in the same run. Their rows are in
data/tests_eval/<policy>.jsonl: the same fields, `test` for the set's name, and neither twins nor samples.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from stages.engine.open import open_engine
from stages.policy.adapter import load_tokenizer
from stages.policy.complete import complete
from stages.policy.context import Model, base_context, refuse_long
from stages.policy.request import Request, request_seed
from stages.run.files import read_jsonl, write_json, write_jsonl
from stages.run.paths import (
    BASE,
    CHANGED,
    PLATINUM,
    PLATINUM_DETAILS,
    PLATINUM_EVAL,
    PLATINUM_METRICS,
    TESTS,
    TESTS_EVAL,
)
from stages.run.process import fix_arithmetic
from stages.run.rounds import adapter_of
from stages.run.stage import stage_run
from stages.stats.changed import changed_metrics
from stages.stats.one import summarise
from stages.stats.testsets import metrics_of_tests
from stages.text.prompts import prompt_ids
from stages.text.verdict import sample_verdict, verdict


def main(policy: str) -> None:
    """Evaluate one policy: `base`, `sft`, or the name of a round."""
    adapter = adapter_of(policy)
    rows_file, tests_file = PLATINUM_EVAL / f"{policy}.jsonl", TESTS_EVAL / f"{policy}.jsonl"
    metrics_file, details_file = PLATINUM_METRICS / f"{policy}.json", PLATINUM_DETAILS / f"{policy}.json"
    with stage_run(
        "evaluate",
        variant=policy,
        sections=("evaluate", "prompt", "seed"),
        inputs=[PLATINUM, CHANGED, TESTS, BASE, *([adapter] if adapter else [])],
        outputs=[rows_file, tests_file, metrics_file, details_file],
    ) as run:
        spec, seed = run.params.evaluate, run.params.seed
        fix_arithmetic(run.params.hardware.threads, seed)
        problems = list(read_jsonl(PLATINUM, {"id": str, "question": str, "gold": str}))
        changed = list(read_jsonl(CHANGED, {"id": str, "of": str, "question": str, "gold": str}))
        others = list(read_jsonl(TESTS, {"id": str, "test": str, "question": str, "gold": str}))

        # One request for the greedy answer, one for each sample, each twin, each question of another test set.
        tokenizer = load_tokenizer()
        model = Model(tokenizer, base_context(), run.params.prompt)
        for path, asked in ((PLATINUM, problems), (CHANGED, changed), (TESTS, others)):
            refuse_long(path, asked, [(None, None)], model, "evaluate.max_new_tokens", spec.max_new_tokens)
        requests = []
        for problem in problems:
            prompt = tuple(prompt_ids(tokenizer, run.params.prompt, problem["question"]))
            requests.append(Request(f"{problem['id']}/greedy", prompt, spec.max_new_tokens))
            for k in range(spec.samples):
                name, own_seed = f"{problem['id']}/{k}", request_seed(seed, "evaluate", problem["id"], str(k))
                requests.append(
                    Request(name, prompt, spec.max_new_tokens, spec.temperature, spec.top_p, own_seed)
                )
        for one in (*changed, *others):
            prompt = tuple(prompt_ids(tokenizer, run.params.prompt, one["question"]))
            requests.append(Request(f"{one['id']}/greedy", prompt, spec.max_new_tokens))

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
        rows = [build_row(problem, completions, spec.samples) for problem in problems]
        if changed:
            twins = defaultdict(list)
            for twin in changed:
                twins[twin["of"]].append(build_twin(twin, completions))
            rows = [{**row, "twins": twins[row["id"]]} for row in rows]
        write_jsonl(rows_file, rows)
        tests = [{"test": one["test"], **build_row(one, completions, 0)} for one in others]
        write_jsonl(tests_file, tests)
        metrics = summarise(rows, seed) | changed_metrics(rows, seed) | metrics_of_tests(tests, seed)
        write_json(details_file, metrics)
        write_json(metrics_file, headline_metrics(metrics, spec.samples))
        run.finish(f"{metrics['accuracy']:.1%} of {len(rows):,} questions answered right")


def headline_metrics(metrics: dict[str, Any], samples: int) -> dict[str, Any]:
    """The few metrics that `dvc metrics show` prints as a table; all others are in metrics/platinum_details/."""
    drawn = [f"mean_at_{samples}", f"maj_at_{samples}", f"pass_at_{samples}"] if samples else []
    twins = ["changed", "both", "kept"]
    names = ["accuracy", "accuracy_low", "accuracy_high", "flexible", *drawn, *twins, "truncated", "leak"]
    few = {name: metrics[name] for name in names if name in metrics}
    tests = {name: values["accuracy"] for name, values in metrics.get("tests", {}).items()}
    return few | ({"tests": tests} if tests else {})


def build_row(
    problem: dict[str, Any], completions: dict[str, dict[str, Any]], samples: int
) -> dict[str, Any]:
    """The graded row of one question, with its samples if any were drawn."""
    question, gold = problem["question"], problem["gold"]
    greedy = completions[f"{problem['id']}/greedy"]
    row = {"id": problem["id"], "question": question, "gold": gold}
    row |= verdict(greedy["text"], gold, question, greedy["tokens"], greedy["finish"])
    if samples:
        drawn = [completions[f"{problem['id']}/{k}"] for k in range(samples)]
        row["samples"] = [
            sample_verdict(one["text"], gold, question)
            | {name: one[name] for name in ("tokens", "finish", "logprob")}
            for one in drawn
        ]
    return row


def build_twin(twin: dict[str, Any], completions: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One twin of a question, with its graded greedy answer."""
    greedy = completions[f"{twin['id']}/greedy"]
    return {
        **{name: twin[name] for name in ("id", "question", "gold")},
        **sample_verdict(greedy["text"], twin["gold"], twin["question"]),
        "tokens": greedy["tokens"],
        "finish": greedy["finish"],
    }
