"""`python -m stages ask "QUESTION" --samples 8`: draws several solutions and lets them vote for the answer.

A sample's vote has the weight that the signal of `regime_w.vote` gives it: samples that agree in how they got to their
answer count more. The solution that is shown is the one with the largest weight among those with the chosen answer.
"""

from __future__ import annotations

from typing import Any

from stages.engine.load import load_engine
from stages.policy.adapter import load_tokenizer
from stages.policy.request import Request, request_seed
from stages.regime_w.voting import Voter
from stages.run.params import load_params
from stages.run.process import fix_arithmetic
from stages.run.rounds import adapter_of
from stages.text.answers import read_answer
from stages.text.prompts import prompt_ids
from stages.tools.show import new_console, new_table, printable


def ask_samples(
    question: str, policy: str, samples: int, temperature: float, seed: int, max_new_tokens: int | None
) -> None:
    """Draw `samples` solutions and print answers, weights, and the chosen one with its solution.

    `temperature` 0 stands for the evaluation's; `top_p` is the evaluation's. Raises UserError when the scorer of
    `regime_w.scorer` cannot be used.
    """
    params = load_params()
    voter = Voter(params.regime_w)  # so that a wrong scorer is reported before the model is loaded
    fix_arithmetic(params.hardware.threads, seed)
    spec = params.evaluate
    temperature = temperature or spec.temperature
    tokenizer = load_tokenizer()
    prompt = tuple(prompt_ids(tokenizer, params.prompt, question))
    limit = max_new_tokens or spec.max_new_tokens
    requests = [
        Request(str(k), prompt, limit, temperature, spec.top_p, request_seed(seed, "ask", question, str(k)))
        for k in range(samples)
    ]
    drawn = {one.id: one for one in load_engine(adapter_of(policy), params.hardware).generate(requests)}
    rows: list[dict[str, Any]] = []
    for one in (drawn[request.id] for request in requests):
        text = params.prompt.opening + tokenizer.decode(one.tokens, skip_special_tokens=True)
        row = {"completion": text, "answer": read_answer(text, question).answer, "tokens": len(one.tokens)}
        rows.append({**row, "finish": one.finish, "logprob": one.logprob})
    weights = voter.weigh(question, rows)[voter.rule]

    sums: dict[str, float] = {}
    for row, weight in zip(rows, weights, strict=True):
        if row["answer"] is not None:
            sums[row["answer"]] = sums.get(row["answer"], 0.0) + weight
    console = new_console()
    chosen = max(sums, key=lambda answer: sums[answer], default=None)
    title = f"{samples} samples at temperature {temperature:g}, weighted by {voter.rule}"
    table = new_table(
        "sample",
        "answer",
        "weight",
        "",
        right=("sample", "answer", "weight"),
        title=title,
        min_width=len(title),
    )
    for k, (row, weight) in enumerate(zip(rows, weights, strict=True), 1):
        cut = "cut" if row["finish"] == "length" else ""
        table.add_row(str(k), "none" if row["answer"] is None else row["answer"], f"{weight:.3f}", cut)
    console.print(table)
    if chosen is None:
        console.print("no sample has an answer")
        return
    total = sum(sums.values())
    for answer in sorted(sums, key=lambda one: -sums[one]):
        votes = sum(row["answer"] == answer for row in rows)
        share = f"{sums[answer] / total:.0%} of the weight" if total else "no weight"
        console.print(f"{answer}: {votes} of {samples} samples, {share}")
    mine = [k for k, row in enumerate(rows) if row["answer"] == chosen]
    best = max(mine, key=lambda k: weights[k])
    console.print(f"\nsample {best + 1}", style="bold")
    console.print(printable(rows[best]["completion"]))
    console.print(f"answer: {chosen}")
