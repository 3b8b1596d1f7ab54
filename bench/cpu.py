"""Generation on the CPU: our engine against `model.generate` in fixed batches, on one model, in one run.

    python bench/cpu.py                        # after `dvc repro`; several minutes on two cores
    python bench/cpu.py --questions 100 --rounds 1

What is generated is the profile's rollout (its questions through each of its arms, with the SFT policy), and one
greedy completion of the same questions. `model.generate` is called as people write it: questions in their own
order, 32 or 64 to a batch, padded on the left, one call with the arm's temperature and top_p. Both are given the
same model object and prompts, and stop at the same end tokens; texts are not decoded. In each round all take their
turn; of each figure the best round counts. Drawn completions differ, as the random numbers do, hence tokens a
second; tokens are counted without the end token. "a processor second" divides by what all threads used: when others
work on the machine, only that can be trusted, and only with `--threads 1`, since two threads burn time waiting.

Ends with a Markdown table. Exit status 1: our rollout is less than 1.5 times as fast as the fastest of the others.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

from common import ROOT, machine, note, print_table

sys.path.insert(0, str(ROOT))
from stages.core.launch import fix_arithmetic, prepare_process
from stages.core.params import Params, load_params

prepare_process()  # before torch is imported
import torch  # noqa: E402

from stages.core.paths import BASE, SFT_ADAPTER  # noqa: E402
from stages.core.policy import load_policy  # noqa: E402
from stages.core.prompts import prompt_ids  # noqa: E402
from stages.core.records import read_jsonl  # noqa: E402
from stages.engine.base import Request, request_seed  # noqa: E402
from stages.engine.choose import make_engine  # noqa: E402
from stages.engine.transformers_engine import TransformersEngine  # noqa: E402
from stages.engine.workers import WorkersEngine  # noqa: E402
from stages.rollout import TRAIN, choose  # noqa: E402

WANTED = 1.5
Tokens = dict[str, tuple[int, ...]]  # new tokens without the end token, by request
Way = Callable[[Sequence[Request]], Tokens]


@dataclass(frozen=True)
class Rate:
    """Tokens a second, and tokens a processor second."""

    wall: float
    processor: float


def main() -> int:
    """Generate both ways, print the table; the exit status."""
    with contextlib.ExitStack() as stack:
        return measure(stack)


def measure(stack: contextlib.ExitStack) -> int:
    """See `main`; `stack` ends the processes it starts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", type=int, help="(default: the profile's rollout.questions)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 64], help="of model.generate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="(default: the profile's)")
    parser.add_argument(
        "--processes", type=int, help="also ours in so many processes, each with these threads"
    )
    options = parser.parse_args()
    if min(options.rounds, 1 if options.questions is None else options.questions) < 1:
        parser.error("--rounds and --questions must be at least 1")
    os.chdir(ROOT)  # where the processes look for the checkpoints
    params = load_params(ROOT)
    threads = options.threads or params.hardware.threads
    fix_arithmetic(threads, params.seed)
    for needed in (ROOT / TRAIN, ROOT / BASE, ROOT / SFT_ADAPTER):
        if not needed.exists():
            raise SystemExit(f"{needed}: is missing; run `dvc repro` first")
    model, tokenizer = load_policy(ROOT / SFT_ADAPTER, ROOT / BASE)
    engine = make_engine(model, tokenizer, params.hardware)
    if not isinstance(engine, TransformersEngine):
        raise SystemExit(
            f"this measures the CPU engine, but {type(engine).__name__} is chosen on this machine"
        )
    ends = engine.end_ids.tolist()

    def ours(requests: Sequence[Request]) -> Tokens:
        return {one.id: one.tokens for one in engine.generate(requests)}

    def plain(requests: Sequence[Request], batch: int) -> Tokens:
        return dict(generate(model, tokenizer.pad_token_id, ends, requests, batch))

    rows = params.hardware.generation_batch
    ways: dict[str, Way] = {f"ours, batch {rows}": ours}
    if options.processes:
        hardware = params.hardware.model_copy(update={"threads": threads})
        workers = stack.enter_context(WorkersEngine(SFT_ADAPTER, hardware, options.processes))
        list(
            workers.generate([Request("warm", (1, 2), 1)])
        )  # they have loaded the model once one has answered
        ways[f"ours, batch {rows}, {options.processes} processes"] = lambda requests: {
            one.id: one.tokens for one in workers.generate(requests)
        }
    for batch in options.batch_sizes:
        ways[f"model.generate, batch {batch}"] = partial(plain, batch=batch)
    rates: dict[tuple[str, str], list[Rate]] = {}
    made: dict[tuple[str, str], Tokens] = {}
    tasks = make_tasks(params, tokenizer, options.questions)
    for number in range(options.rounds):
        for task, requests in tasks.items():
            for way, complete in ways.items():
                torch.manual_seed(params.seed)
                wall, processor = time.perf_counter(), time.process_time()
                completions = complete(requests)
                wall, processor = time.perf_counter() - wall, time.process_time() - processor
                tokens = sum(map(len, completions.values()))
                processor = processor if "processes" not in way else math.nan  # theirs is not counted here
                rates.setdefault((task, way), []).append(Rate(tokens / wall, tokens / processor))
                made[task, way] = completions
                note(f"round {number + 1}, {task}, {way}: {tokens:,} tokens, {wall:.1f} s")

    best = {
        key: Rate(max(rate.wall for rate in of), max(rate.processor for rate in of))
        for key, of in rates.items()
    }
    first, *others = ways
    table = []
    for way in ways:
        cells = [way]
        for task in tasks:
            own, rate = best[task, first], best[task, way]
            for part, ours_part in ((rate.wall, own.wall), (rate.processor, own.processor)):
                ratio_cell = f" ({ours_part / part:.1f}x)" if way != first else ""
                cells.append("" if math.isnan(part) else f"{part:,.0f}{ratio_cell}")
        greedy = made["greedy", way]
        same = sum(made["greedy", first][name] == tokens for name, tokens in greedy.items())
        table.append([*cells, f"{same:,} of {len(greedy):,}" if way != first else ""])
    ratio = best["rollout", first].wall / max(
        best["rollout", way].wall for way in others if way.startswith("model")
    )
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    print(f"Rollout, against the fastest of the others: {ratio:.1f}x (wanted: {WANTED:g}x)")
    print(
        f"{len(tasks['greedy']):,} questions, {len(tasks['rollout']):,} trajectories, profile {params.profile}"
    )
    print(f"{machine(torch.get_num_threads())}, {versions}")
    print(
        f"Tokens a second, best of {options.rounds} round(s); in brackets: how many times as fast ours is\n"
    )
    heads = [f"{task}, {per}" for task in tasks for per in ("a second", "a processor second")]
    print_table(["", *heads, "same greedy completions"], table)
    return int(ratio < WANTED)


def make_tasks(params: Params, tokenizer: Any, questions: int | None) -> dict[str, list[Request]]:
    """The requests of the rollout, arm after arm, and those of greedy decoding."""
    spec = params.rollout
    count = spec.questions if questions is None else questions
    every = list(read_jsonl(ROOT / TRAIN, {"id": str, "question": str}))
    problems = [every[place] for place in choose(len(every), count, params.seed)]
    drawn = []
    for name, arm in spec.arms.items():
        for problem in problems:
            prompt = prompt_ids(tokenizer, params.prompt, problem["question"], arm.style, arm.system)
            seed = request_seed(params.seed, "rollout", problem["id"], name)
            identity = f"{problem['id']}/{name}"
            drawn.append(
                Request(identity, tuple(prompt), spec.max_new_tokens, arm.temperature, arm.top_p, seed)
            )
    greedy = [
        Request(
            problem["id"],
            tuple(prompt_ids(tokenizer, params.prompt, problem["question"])),
            spec.max_new_tokens,
        )
        for problem in problems
    ]
    return {"rollout": drawn, "greedy": greedy}


def generate(
    model: Any, pad: int, ends: list[int], requests: Sequence[Request], batch: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Each request's new tokens by `model.generate`; a batch holds requests with the same settings, in order."""
    settings = dict.fromkeys((one.max_new_tokens, one.temperature, one.top_p) for one in requests)
    for limit, temperature, top_p in settings:
        alike = [
            one
            for one in requests
            if (one.max_new_tokens, one.temperature, one.top_p) == (limit, temperature, top_p)
        ]
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        for start in range(0, len(alike), batch):
            rows = alike[start : start + batch]
            width = max(len(one.prompt) for one in rows)
            padded = torch.tensor([[pad] * (width - len(one.prompt)) + list(one.prompt) for one in rows])
            mask = torch.tensor([[0] * (width - len(one.prompt)) + [1] * len(one.prompt) for one in rows])
            output = model.generate(
                input_ids=padded.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=limit,
                eos_token_id=ends,
                pad_token_id=pad,
                **(sampling if temperature else {"do_sample": False}),
            )
            for one, tokens in zip(rows, output[:, width:].tolist(), strict=True):
                end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
                yield one.id, tuple(tokens[:end])


if __name__ == "__main__":
    sys.exit(main())
