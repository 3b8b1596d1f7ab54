"""Generation on the CPU: our engine against `model.generate` in fixed batches, on one model, in one run.

    python bench/cpu.py                        # after `dvc repro`; several minutes on two cores
    python bench/cpu.py --questions 100 --rounds 1

What is generated is the profile's rollout (its questions through each of its arms, by the SFT policy), and one greedy
completion of each of the same questions. `model.generate` is called as most people call it: questions in their own
order, 32 or 64 to a batch, padded on the left, one call with the arm's temperature and top_p. Both are given the
same model object and prompts, and stop at the same end tokens; texts are not decoded. Each round measures all of them
in turn, and the best round of each counts. Drawn completions differ, because the random numbers do, so the table
gives tokens a second, without end tokens. "a processor second" divides by the processor time of all threads. While
others work on the machine, trust only that, and only with `--threads 1`: two threads burn time waiting for each other.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from functools import partial

from common import ROOT, generate_plainly, machine, new_parser, note, plain_batches, print_table, versions

from stages.policy.request import Engine, Request, request_seed
from stages.run.files import read_jsonl
from stages.run.params import Params, load_params
from stages.run.paths import BASE, SFT_ADAPTER, TRAIN
from stages.run.process import fix_arithmetic, prepare_process
from stages.text.prompts import prompt_ids

Tokens = dict[str, tuple[int, ...]]  # new tokens without the end token, by request
Way = Callable[[Sequence[Request]], Tokens]


def main() -> None:
    """Generate both ways and print the table."""
    parser = new_parser(__doc__)
    parser.add_argument("--questions", type=int, help="(default: the profile's rollout.questions)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="(default: the profile's)")
    parser.add_argument(
        "--processes", type=int, help="also ours in this many processes, each with these threads"
    )
    options = parser.parse_args()
    prepare_process()  # before torch is imported
    import torch

    from stages.engine.load import engine_around
    from stages.engine.workers import WorkersEngine
    from stages.policy.adapter import load_policy

    os.chdir(ROOT)  # where the processes look for the checkpoints
    params = load_params()
    threads = options.threads or params.hardware.threads
    fix_arithmetic(threads, params.seed)
    for needed in (TRAIN, BASE, SFT_ADAPTER):
        if not needed.exists():
            raise SystemExit(f"{needed}: is missing; run `dvc repro` first")
    model, tokenizer = load_policy(SFT_ADAPTER)
    engine = engine_around(model, tokenizer, params.hardware)
    ends, pad = engine.end_ids.tolist(), tokenizer.pad_token_id

    def ours(engine: Engine, requests: Sequence[Request]) -> Tokens:
        return {one.id: one.tokens for one in engine.generate(requests)}

    def plain(size: int, requests: Sequence[Request]) -> Tokens:
        made: Tokens = {}
        for batch in plain_batches(requests, size):
            found = generate_plainly(model, batch, pad, ends)
            made.update(zip((one.id for one in batch), found, strict=True))
        return made

    first = f"ours, batch {params.hardware.generation_batch}"
    tasks = make_tasks(params, tokenizer, options.questions or params.rollout.questions)
    ways: dict[str, Way] = {first: partial(ours, engine)}
    with contextlib.ExitStack() as stack:
        if options.processes:
            hardware = params.hardware.model_copy(update={"threads": threads})
            workers = stack.enter_context(WorkersEngine(SFT_ADAPTER, hardware, options.processes))
            ours(workers, [Request("warm", (1, 2), 1)])  # they have loaded the model once one has answered
            ways[f"{first}, {options.processes} processes"] = partial(ours, workers)
        for size in (32, 64):
            ways[f"model.generate, batch {size}"] = partial(plain, size)
        best: dict[tuple[str, str], tuple[float, float]] = {}  # tokens a second, and a processor second
        greedy: dict[str, Tokens] = {}
        for number in range(options.rounds):
            for task, requests in tasks.items():
                for way, complete in ways.items():
                    wall, processor = time.perf_counter(), time.process_time()
                    completions = complete(requests)
                    wall, processor = time.perf_counter() - wall, time.process_time() - processor
                    tokens = sum(map(len, completions.values()))
                    note(f"round {number + 1}, {task}, {way}: {tokens:,} tokens, {wall:.1f} s")
                    before = best.get((task, way), (0.0, 0.0))
                    best[task, way] = max(before[0], tokens / wall), max(before[1], tokens / processor)
                    if task == "greedy":
                        greedy[way] = completions

    table = []
    for way in ways:
        cells = [way]
        for task in tasks:
            for rate, own in zip(best[task, way], best[task, first], strict=True):
                cells.append(f"{rate:,.0f}" + (f" ({own / rate:.1f}x)" if way != first else ""))
            if "processes" in way:
                cells[-1] = ""  # the processor time of other processes is not known here
        same = sum(greedy[first][name] == tokens for name, tokens in greedy[way].items())
        table.append([*cells, f"{same:,} of {len(greedy[way]):,}" if way != first else ""])
    print(
        f"{len(tasks['greedy']):,} questions, {len(tasks['rollout']):,} trajectories, profile {params.profile}"
    )
    print(f"{machine(torch.get_num_threads())}, {versions('torch', 'transformers', 'peft')}")
    print(
        f"Tokens a second, best of {options.rounds} round(s); in brackets: how many times as fast ours is\n"
    )
    heads = [f"{task}, {per}" for task in tasks for per in ("a second", "a processor second")]
    print_table(["", *heads, "same greedy completions"], table)


def make_tasks(params: Params, tokenizer: object, questions: int | None) -> dict[str, list[Request]]:
    """The requests of the rollout, and those of greedy decoding."""
    from stages.policy.questions import pick_questions
    from stages.rollout import problems_at

    spec = params.rollout
    places = pick_questions(sum(1 for _ in read_jsonl(TRAIN)), [questions], params.seed)
    tasks: dict[str, list[Request]] = {"rollout": [], "greedy": []}
    for problem in problems_at(places):
        for name, arm in spec.arms.items():
            prompt = tuple(prompt_ids(tokenizer, params.prompt, problem["question"], arm.style, arm.system))
            seed = request_seed(params.seed, "rollout", problem["id"], name)
            settings = (spec.max_new_tokens, arm.temperature, arm.top_p, seed)
            tasks["rollout"].append(Request(f"{problem['id']}/{name}", prompt, *settings))
        prompt = tuple(prompt_ids(tokenizer, params.prompt, problem["question"]))
        tasks["greedy"].append(Request(problem["id"], prompt, spec.max_new_tokens))
    return tasks


if __name__ == "__main__":
    main()
