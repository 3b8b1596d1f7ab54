"""How far the engines of this machine differ: the same requests through each, on one policy of a finished run.

    python bench/engines.py [--policy sft] [--questions 200] [--run FOLDER]

One greedy and three drawn completions a question. The first engine, `transformers`, is the yardstick; once more with
few rows at a time it shows what rounding alone does. The columns: the share of greedy completions, and of drawn ones,
that are the same token by token; over the completions that are the same, the largest difference of the summed
log-probability divided by the tokens. Speed is measured elsewhere.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from common import ROOT, machine, note, print_table

sys.path.insert(0, str(ROOT))
from stages.core.launch import fix_arithmetic, prepare_process

DRAWN = [(0.7, 1.0), (0.9, 0.95), (1.1, 1.0)]  # temperature, top_p


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", default="sft", choices=["base", "sft", "dpo"])
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument(
        "--run", type=Path, default=ROOT, help="a folder with data/ and checkpoints/ of a run"
    )
    options = parser.parse_args()
    if options.questions < 1:
        parser.error("--questions must be 1 or more")
    prepare_process()
    os.chdir(options.run)  # the engines look for checkpoints/ where they stand

    import torch

    from stages.core.params import load_params
    from stages.core.paths import ADAPTERS
    from stages.core.policy import load_policy, load_tokenizer
    from stages.core.prompts import prompt_ids
    from stages.core.records import read_jsonl
    from stages.engine.base import Completion, Engine, Request, end_ids, request_seed
    from stages.engine.continuous_engine import ContinuousEngine
    from stages.engine.transformers_engine import TransformersEngine
    from stages.engine.vllm_engine import VllmEngine
    from stages.evaluate import PLATINUM

    params, adapter = load_params(), ADAPTERS[options.policy]
    fix_arithmetic(params.hardware.threads, 0)
    tokenizer, limit = load_tokenizer(), params.evaluate.max_new_tokens
    requests = []
    for problem in islice(read_jsonl(PLATINUM, {"id": str, "question": str}), options.questions):
        prompt = tuple(prompt_ids(tokenizer, params.prompt, problem["question"]))
        requests.append(Request(f"{problem['id']}/greedy", prompt, limit))
        for k, (temperature, top_p) in enumerate(DRAWN):
            seed = request_seed(params.seed, "engines", problem["id"], str(k))
            requests.append(Request(f"{problem['id']}/{k}", prompt, limit, temperature, top_p, seed))
    greedy = {one.id for one in requests if one.temperature == 0}

    def in_memory(kind: str, batch: int) -> Engine:
        model, _ = load_policy(adapter)
        ends = end_ids(tokenizer, model.generation_config)
        if kind == "transformers":
            return TransformersEngine(model, ends, tokenizer.pad_token_id, batch)
        return ContinuousEngine(model, ends, tokenizer.pad_token_id)

    on_gpu = torch.cuda.is_available()
    engines: dict[str, Callable[[], Engine]] = {
        "transformers": lambda: in_memory("transformers", 256),
        "transformers, 16 rows at once": lambda: in_memory("transformers", 16),
        "continuous": lambda: in_memory("continuous", 0),
    }
    if importlib.util.find_spec("vllm"):
        engines["vllm"] = lambda: VllmEngine(adapter)
    wanted: dict[str, Completion] = {}
    rows = []
    for name, make in engines.items():
        engine = make()
        started = time.perf_counter()
        found = {one.id: one for one in engine.generate(requests)}
        seconds = time.perf_counter() - started
        note(f"{name}: {len(found)} completions in {seconds:.1f} s")
        if len(found) != len(requests):
            raise SystemExit(f"{name}: {len(requests) - len(found)} completions are missing")
        wanted = wanted or found
        same = {
            one
            for one in found
            if found[one].tokens == wanted[one].tokens and found[one].finish == wanted[one].finish
        }
        apart = max(
            (abs(found[one].logprob - wanted[one].logprob) / (len(found[one].tokens) + 1) for one in same),
            default=0.0,
        )
        model = getattr(engine, "model", None)
        rows.append([
            name,
            getattr(engine, "kernel", None) or (model.config._attn_implementation if model else "its own"),
            f"{len(same & greedy) / len(greedy):.1%}",
            f"{len(same - greedy) / (len(requests) - len(greedy)):.1%}",
            f"{apart:.1e}",
        ])  # fmt: skip
        del engine
        torch.cuda.empty_cache()

    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft")
    )
    where = torch.cuda.get_device_name() if on_gpu else machine(torch.get_num_threads())
    precision = str(load_policy(None)[0].dtype).removeprefix("torch.")
    print(
        f"{where}; {versions}; policy {options.policy} in {precision}; {len(requests):,} requests of {limit} tokens\n"
    )
    head = ["engine", "attention", "greedy the same", "drawn the same", "log-prob. apart, a token"]
    print_table(head, rows)


if __name__ == "__main__":
    main()
