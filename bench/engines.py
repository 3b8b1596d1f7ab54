"""How far the engines of this machine differ: the same requests through each, on one policy of a finished run.

    python bench/engines.py [--policy sft] [--questions 200] [--run FOLDER]

One greedy and three drawn completions a question. The others are compared with the first engine, `transformers`; the
same engine with few rows at a time shows what rounding alone does. The columns: the share of greedy completions, and
of drawn ones, that are the same token by token; and, over the completions that are the same, the largest difference of
the summed log-probability divided by the tokens. bench/cpu.py and bench/gpu.py measure speed.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from common import ROOT, machine, new_parser, note, print_table, versions

from stages.policy.request import Completion, Engine, Request, request_seed
from stages.run.files import read_jsonl
from stages.run.params import load_params
from stages.run.paths import BASE, PLATINUM
from stages.run.process import fix_arithmetic, prepare_process
from stages.run.rounds import adapter_of
from stages.text.prompts import prompt_ids

DRAWN = [(0.7, 1.0), (0.9, 0.95), (1.1, 1.0)]  # temperature, top_p


def main() -> None:
    """Complete the requests by every engine and print the table."""
    parser = new_parser(__doc__)
    parser.add_argument("--policy", default="sft")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument(
        "--run", type=Path, default=ROOT, help="a folder with data/ and checkpoints/ of a run"
    )
    options = parser.parse_args()
    prepare_process()  # before torch is imported
    os.chdir(options.run)  # the engines look for checkpoints/ in the current folder

    import torch
    from transformers import AutoConfig

    from stages.engine.load import engine_around
    from stages.engine.vllm_engine import VllmEngine
    from stages.policy.adapter import load_policy, load_tokenizer

    params, adapter = load_params(), adapter_of(options.policy)
    fix_arithmetic(params.hardware.threads, 0)
    tokenizer, limit, requests = load_tokenizer(), params.evaluate.max_new_tokens, []
    for problem in islice(read_jsonl(PLATINUM, {"id": str, "question": str}), options.questions):
        prompt = tuple(prompt_ids(tokenizer, params.prompt, problem["question"]))
        requests.append(Request(f"{problem['id']}/greedy", prompt, limit))
        for k, (temperature, top_p) in enumerate(DRAWN):
            seed = request_seed(params.seed, "engines", problem["id"], str(k))
            requests.append(Request(f"{problem['id']}/{k}", prompt, limit, temperature, top_p, seed))
    greedy = {one.id for one in requests if one.temperature == 0}

    def in_memory(batch: int) -> Engine:
        hardware = params.hardware.model_copy(update={"generation_batch": batch})
        return engine_around(*load_policy(adapter), hardware)

    engines: dict[str, Callable[[], Engine]] = {
        "transformers": lambda: in_memory(256),
        "transformers, 16 rows at once": lambda: in_memory(16),
    }
    if importlib.util.find_spec("vllm"):
        engines["vllm"] = lambda: VllmEngine(adapter)
    wanted: dict[str, Completion] = {}
    rows = []
    for name, make in engines.items():
        engine, started = make(), time.perf_counter()
        found = {one.id: one for one in engine.generate(requests)}
        note(f"{name}: {len(found)} completions in {time.perf_counter() - started:.1f} s")
        if len(found) != len(requests):
            raise SystemExit(f"{name}: {len(requests) - len(found)} completions are missing")
        wanted = wanted or found
        same, apart = set(), 0.0
        for one, completion in found.items():
            first = wanted[one]
            if (completion.tokens, completion.finish) == (first.tokens, first.finish):
                same.add(one)
                difference = abs(completion.logprob - first.logprob) / (len(first.tokens) + 1)
                apart = max(apart, difference)
        drawn = len(same - greedy) / (len(requests) - len(greedy))
        rows.append([name, f"{len(same & greedy) / len(greedy):.1%}", f"{drawn:.1%}", f"{apart:.1e}"])
        del engine  # so that the next one finds the GPU empty
        torch.cuda.empty_cache()

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else machine(torch.get_num_threads())
    precision = str(AutoConfig.from_pretrained(BASE, local_files_only=True).dtype).removeprefix("torch.")
    print(f"{where}; {versions('torch', 'transformers', 'peft', 'vllm')}")
    print(f"policy {options.policy} in {precision}; {len(requests):,} requests of {limit} tokens\n")
    print_table(["engine", "greedy the same", "drawn the same", "log-probability apart, for a token"], rows)


if __name__ == "__main__":
    main()
