"""The real run's work: a 7B model of Abel's shape on a GPU, measured beside what a user would run otherwise.

    python bench/gpu.py                # one GPU or several: 9 minutes, one table last
    python bench/gpu.py --try all      # also settings that might train faster; give it --minutes 20
    python bench/gpu.py --smollm2      # the same on a processor: SmolLM2-135M's shape and profile
    python bench/gpu.py --small        # a tiny model, on the CPU: does the bench itself work?

Nothing is downloaded. The model is a Mistral of Abel-7B-002's configuration with random bf16 weights, made on the
GPU, under a random LoRA adapter; sizes and settings are those of profiles/abel-7b.yaml (SmolLM2's are those of
profiles/smollm2-135m.yaml). Random weights do not stop by themselves, so every request has a limit of its own. Lengths
follow GSM8K's training set in the tokens of Mistral's tokenizer (LENGTHS below); answers are stretched to 200 tokens on
average.

Each part runs in a process of its own, so that its memory is its own and a failure costs its rows only:

- generation: rollouts and the greedy evaluation by one engine (--engine), after a warm-up. The time that the engine
  takes to start is not in the rate; it is given beside it. When a part's time runs out before its requests are done,
  the rate is that of the completions after the first quarter of the time.
- selection: the answers by which SFT and DPO choose their steps, by the engine that generates while a model trains.
- generate: rollouts and evaluation by `model.generate`, 32 rows at a time in their own order, each batch going on until
  its longest answer is done. Only tokens up to each row's limit count. Some of the requests, scaled by tokens.
- sft, dpo: the trainers and arguments of the stages, after 2 warm-up steps. The loss and its FLOPs count real tokens,
  no padding. "by TRL" are TRL's own trainers on the same tokens with nothing set but where to write.

FLOPs of a row of L tokens, A of them in the answer, in a model with P weights in its layers' matrices, H in its
head, Q in the adapter, N layers of width D: forward 2PL + 2HA + 2QL + 2NDL^2. The last term is attention, of which the
causal half counts. LoRA training is the forward, then as much for the gradients by the activations, then 2QL for
the adapter's gradients and 2NDL^2 more for attention, both of whose factors have a gradient. DPO is that for both
rows of a pair, and a forward of each by the reference. Recomputation (gradient checkpointing) gets no credit. The
share is of this chip's matmul rate in this run, in the model's precision, on square matrices of 8,192 (on a
processor, of 512).

The projection is the profile's pipeline: 7,473 examples times its epochs, its rollouts, the most pairs that its
questions can give, the selection, three evaluations. It leaves out downloads, loading of weights, and stages without
a model.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import (
    ROOT,
    change,
    generate_plainly,
    make_workplace,
    new_parser,
    note,
    plain_batches,
    print_table,
    versions,
)

from stages.policy.request import Engine, Request, request_seed
from stages.run.files import read_json, write_json
from stages.run.guard import end_with
from stages.run.params import Params, Sections, load_params
from stages.run.paths import BASE, SFT_ADAPTER
from stages.run.process import computes_bf16, fix_arithmetic, prepare_process
from stages.run.stage import StageRun

EXAMPLES, PLATINUM, ANSWER_TOKENS = 7_473, 1_209, 200
PLAIN_ROWS = 32
WARM_UP_STEPS = 2
PLAN, RESULT = "plan.json", "result.json"
SHAPES = {
    "abel-7b": {
        "vocab_size": 32_032, "hidden_size": 4_096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32_768,
    },
    "smollm2-135m": {
        "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1_536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8_192,
        "tie_word_embeddings": True,
    },
    "small": {
        "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2_048,
    },
}  # fmt: skip
# GSM8K's 7,473 training problems: the smallest, each twentieth, ... and the largest number of tokens.
LENGTHS = {
    "prompt": (30, 58, 63, 66, 69, 71, 74, 76, 79, 81, 84, 87, 90, 93, 96, 100, 105, 111, 120, 132, 261),
    "answer": (32, 60, 68, 75, 81, 88, 93, 98, 104, 110, 117, 124, 132, 140, 149, 159, 170, 184, 205, 239, 465),
}  # fmt: skip
# What `--try` adds, each beside the stages' own setting, which balances tokens and takes few rows at once. With
# "inputs in 32 bits" PEFT copies every input of the adapter, as in TRL's trainers.
TRIALS: dict[str, dict[str, Any]] = {
    "2 rows": {"hardware": {"per_device_batch": 2}},
    "4 rows": {"hardware": {"per_device_batch": 4}},
    "8 rows": {"hardware": {"per_device_batch": 8}},
    "16 rows": {"hardware": {"per_device_batch": 16}},
    "the whole batch": {"hardware": {"per_device_batch": 32}},
    "unsorted": {"unsorted": True},
    "activations kept": {"hardware": {"gradient_checkpointing": False}},
    "activations recomputed": {"hardware": {"gradient_checkpointing": True}},
    "padding-free": {"padding_free": True},  # bench/padding_free.py
    "fused layers": {"fused": True},  # Liger's norms and MLP; needs the package liger-kernel
    "inputs in 32 bits": {"plain_trainer": True},
    "compiled": {"arguments": {"torch_compile": True}},
}
Result = dict[str, Any]
SKIPPED: Result = {"error": "skipped"}


@dataclass(frozen=True)
class Part:
    """The work of one process: its function, what it is told, its share of the time, the names of its results."""

    name: str
    work: str
    plan: dict[str, Any]
    share: float = 1.0
    devices: int = 1

    @property
    def gives(self) -> list[str]:
        """`rollouts`, `evaluation by generate`, `dpo`, ..."""
        suffix = self.plan.get("suffix", "")
        return [kind + suffix for kind in self.plan.get("requests", [self.name])]


# ---- the command ---------------------------------------------------------------------------------------


def main() -> None:
    """Run all parts, one after the other, and print the table."""
    parser = new_parser(__doc__)
    parser.add_argument("--minutes", type=float, help="for all parts together (default 9; --small: 1.5)")
    shape = {"action": "store_const", "dest": "shape", "default": "abel-7b"}
    parser.add_argument("--small", const="small", help="a tiny model, on the CPU", **shape)
    parser.add_argument("--smollm2", const="smollm2-135m", help="SmolLM2-135M's shape, on the CPU", **shape)
    parser.add_argument("--engine", default="auto", choices=["auto", "vllm", "transformers"])
    parser.add_argument("--devices", type=int, help="to scale to (default: all GPUs)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts, by name")
    parser.add_argument(
        "--try", nargs="+", default=[], dest="trials", metavar="TRIAL", help=f"all, or: {'; '.join(TRIALS)}"
    )
    parser.add_argument("--part", type=Path, help="(internal: the folder of the part to work on)")
    options = parser.parse_args()
    if options.part:
        work_on(options.part)
        return
    trials = list(TRIALS) if options.trials == ["all"] else options.trials
    if unknown := [name for name in trials if name not in TRIALS]:
        raise SystemExit(f"--try: there is no {unknown[0]!r}; there are: {'; '.join(TRIALS)}")
    minutes = options.minutes or (1.5 if options.shape == "small" else 9.0)
    with tempfile.TemporaryDirectory() as folder:
        place = prepare_place(Path(folder) / "place", options.shape, options.engine)
        chip = run_part(place, Part("matmul", "measure_matmul", {}), 120, options.shape)["matmul"]
        if "error" in chip:
            raise SystemExit(f"bench/gpu.py: {chip['error']}")
        if chip["devices"] == 0 and options.shape == "abel-7b":
            raise SystemExit("bench/gpu.py: no NVIDIA GPU that torch can use; --smollm2 is for processors")
        parts = {part.name: part for part in plan_parts(options.devices or chip["devices"], trials)}
        chosen = options.only or list(parts)
        if unknown := [name for name in chosen if name not in parts]:
            raise SystemExit(f"--only: there is no {unknown[0]!r}; there are: {', '.join(parts)}")
        second = minutes * 60 / sum(parts[name].share for name in chosen)
        results: dict[str, Result] = {}
        for name in chosen:
            results |= run_part(place, parts[name], parts[name].share * second, options.shape)
        params = load_params(place)
    print(
        f"{chip['chip']}; {versions('torch', 'transformers', 'trl', 'peft', 'vllm')}; {time.strftime('%F')}"
    )
    print(f"matmul: {chip['rate'] / 1e12:,.3g} TFLOP/s ({chip['type']}, square of {chip['size']:,})\n")
    print_table(*table(results, chip, params))


def prepare_place(place: Path, shape: str, engine: str) -> Path:
    """A folder with the repository's parameters, the profile of that shape, and the bench's own changes."""
    make_workplace(place)
    profile = "abel-7b" if shape == "small" else shape
    change(place / "params.yaml", [f"profile={profile}"])
    changes = [f"hardware.engine={engine}"]
    if shape == "small":
        changes += ["hardware.threads=1", "hardware.processes=1", "hardware.generation_batch=64"]
        changes += ["sft.batch=16", "dpo.batch=16"]
    if shape != "abel-7b":
        changes += ["rollout.questions=4", "sft.select.questions=8", "dpo.select.questions=8"]
    change(place / "profiles" / f"{profile}.yaml", changes)
    return place


def plan_parts(devices: int, trials: Sequence[str]) -> list[Part]:
    """The parts in the order they run; the trials and those on several devices come last."""
    both = {"rollouts": 0.7, "evaluation": 0.3}
    transformers = {"engine": "transformers"}
    parts = [
        Part("generation", "generate", {"requests": both}, 3.2),
        Part("selection", "generate", {"requests": {"selection": 1.0}, "hardware": transformers}, 0.8),
        Part("generate", "generate_otherwise", {"requests": both, "suffix": " by generate"}, 1.5),
    ]
    for phase in ("sft", "dpo"):
        parts.append(Part(phase, "train", {"phase": phase}))
        parts.append(
            Part(f"{phase} by TRL", "train", {"phase": phase, "defaults": True, "plain_trainer": True})
        )
    for name in trials:
        for phase in ("sft", "dpo"):
            parts.append(Part(f"{phase}, {name}", "train", {"phase": phase, **TRIALS[name]}, 0.8))
    if devices > 1:
        on = f" on {devices}"
        plan = {"requests": {"rollouts": 1.0}, "suffix": on}
        parts.append(Part(f"rollouts{on}", "generate", plan, 2.0, devices))
        parts += [
            Part(f"{phase}{on}", "train", {"phase": phase}, devices=devices) for phase in ("sft", "dpo")
        ]
    return parts


def run_part(place: Path, part: Part, seconds: float, shape: str) -> dict[str, Result]:
    """What the part's process wrote; each result is an `error` when the process failed or took too long."""
    note(f"{part.name}: up to {seconds:.0f} s ...")
    started = time.monotonic()
    patience = seconds + (
        120 if shape == "abel-7b" else 300
    )  # a part ends by itself, but its start may take long
    work = place / "parts" / part.name.replace(" ", "-")
    work.mkdir(parents=True)
    plan = {"work": part.work, "shape": shape, "devices": part.devices, "gives": part.gives, **part.plan}
    write_json(work / PLAN, {**plan, "seconds": seconds, "until": time.time() + seconds})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "bench")))}
    if shape != "abel-7b":
        threads = load_params(place).hardware.threads or os.cpu_count()
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads)}
    elif part.name != "matmul" and part.devices == 1:
        # One process that sees several GPUs would spread its trainer over them.
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = [sys.executable, str(Path(__file__).resolve()), "--part", str(work.relative_to(place))]
    with (work / "output").open("w+") as output:
        process = subprocess.Popen(
            command, cwd=place, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        error = ""
        try:
            if status := process.wait(timeout=patience):
                error = f"ended with status {status}"
        except subprocess.TimeoutExpired:
            error = f"not done after {patience:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # and the processes that it started
                process.wait()
        output.seek(0)
        printed = output.read()
    if error.startswith("ended"):
        note(printed[-2000:])
        lines = [line for line in printed.splitlines() if line.strip()]
        error = lines[-1] if lines else error
    note(f"{part.name}: {error or 'done'} ({time.monotonic() - started:.0f} s)")
    if error:
        return {name: {"error": error} for name in part.gives}
    return read_json(work / RESULT)


# ---- the table -----------------------------------------------------------------------------------------


def table(results: dict[str, Result], chip: Result, params: Params) -> tuple[list[str], Iterator[list[str]]]:
    """Head and rows: ours, what a user would run otherwise, how they compare, and the memory of both."""
    for one in results.values():
        if "flops" in one:
            one["share"] = one["flops"] / one["seconds"] / one["processes"] / chip["rate"]
    ours = {name: name for name in ("rollouts", "evaluation", "selection", "sft", "dpo")}
    other = {name: name + (" by TRL" if name in ("sft", "dpo") else " by generate") for name in ours}
    other["selection"] = other["evaluation"]
    found = dict(results)
    for name, names in (("pipeline", ours), ("pipeline otherwise", other)):
        found[name] = project({kind: results.get(of, SKIPPED) for kind, of in names.items()}, params)
    rollouts = params.rollout.questions * params.rollout.per_question
    lines = [
        ("rollouts, tokens/s", "rate", "rollouts", other["rollouts"]),
        (f"{rollouts:,} rollouts, s", "whole", "rollouts", other["rollouts"]),
        ("greedy evaluation, tokens/s", "rate", "evaluation", other["evaluation"]),
        ("greedy evaluation, s", "whole", "evaluation", other["evaluation"]),
        ("answers in training, tokens/s", "rate", "selection", other["selection"]),
        ("SFT, tokens/s", "rate", "sft", other["sft"]),
        ("SFT, share of the matmul rate", "share", "sft", other["sft"]),
        ("DPO, pairs/s", "rate", "dpo", other["dpo"]),
        ("DPO, share of the matmul rate", "share", "dpo", other["dpo"]),
        ("the whole pipeline, projected, min", "minutes", "pipeline", "pipeline otherwise"),
    ]
    lines += [(name, "rate", name, name.partition(", ")[0]) for name in results if ", " in name]
    lines += [
        (f"{name} devices (otherwise: on 1)", "rate", name, name.partition(" on ")[0])
        for name in results
        if " on " in name
    ]
    head = ["", "ours", "with", "otherwise", "with", "ours is", "peak memory, GiB: ours", "otherwise"]
    return head, (row(label, key, found.get(a, SKIPPED), found.get(b, SKIPPED)) for label, key, a, b in lines)


def row(label: str, key: str, ours: Result, other: Result) -> list[str]:
    """One row: the value at `key` of both and how it was taken, their ratio (above 1 is better), memory."""
    cells = [label]
    for one in (ours, other):
        cells += [str(one["error"]), ""] if "error" in one else [number(one[key]), one["with"]]
    ratio = ""
    if "error" not in ours and "error" not in other:
        less_is_better = key in ("whole", "minutes")
        ratio = f"{number(other[key] / ours[key] if less_is_better else ours[key] / other[key])} ×"
    memory = [f"{one['memory'] / 2**30:,.1f}" if "memory" in one else "" for one in (ours, other)]
    return [cell.replace("|", "/") for cell in (*cells, ratio, *memory)]


def number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def project(results: dict[str, Result], params: Params) -> Result:
    """Minutes of the profile's pipeline at these rates, or the first part that is missing for it."""
    for name, result in results.items():
        if "error" in result:
            return {"error": f"needs {name}"}
    answers = {
        "rollouts": params.rollout.questions * params.rollout.per_question,
        "evaluation": 3 * PLATINUM * (1 + params.evaluate.samples),
    }
    kinds = (params.preference.correctness, params.preference.coherence)
    pairs = params.rollout.questions * sum(kind.per_question for kind in kinds)
    answers["selection"] = 0
    for rows, spec in ((EXAMPLES, params.sft), (pairs, params.dpo)):
        steps = math.ceil(rows / spec.batch) * spec.epochs
        looks = 1 + math.ceil(steps / spec.select.steps)
        answers["selection"] += looks * spec.select.questions * (1 + spec.select.samples)
    seconds = {name: count * ANSWER_TOKENS / results[name]["rate"] for name, count in answers.items()}
    tokens = EXAMPLES * params.sft.epochs * (average("prompt") + average("answer"))
    seconds["sft"] = tokens / results["sft"]["rate"]
    seconds["dpo"] = pairs * params.dpo.epochs / results["dpo"]["rate"]
    spent = ", ".join(f"{name} {value / 60:.1f}" for name, value in seconds.items())
    return {"minutes": sum(seconds.values()) / 60, "with": spent}


# ---- in the part's process -----------------------------------------------------------------------------


def work_on(folder: Path) -> None:
    """Do what the folder's plan says, in this process, and leave the results beside it."""
    from rich.console import Console

    end_with(os.getppid())
    prepare_process()
    plan = read_json(folder / PLAN)
    params = load_params()
    changes = {"processes": plan["devices"], **plan.get("hardware", {})}
    params = params.model_copy(update={"hardware": params.hardware.model_copy(update=changes)})
    sections = ("sft", "rollout", "dpo", "evaluate", "prompt", "seed")
    run = StageRun("bench", Sections(params, sections), folder, Console(stderr=True))
    if plan["work"] == "train":
        from stages.launch.training import train_everywhere

        # In as many processes as the pipeline would start. Fewer rows at once when memory runs out, as there.
        train_everywhere("gpu:train", run, getattr(run.params, plan["phase"]).batch)
    else:
        work = {
            "measure_matmul": measure_matmul,
            "generate": generate,
            "generate_otherwise": generate_otherwise,
        }
        write_json(folder / RESULT, work[plan["work"]](run, plan))


def memory_used() -> dict[str, int]:
    """Peak memory of this process: what it held of the GPU, else of main memory."""
    import torch

    if torch.cuda.is_available():
        return {"memory": torch.cuda.max_memory_reserved()}
    return {"memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def precision(shape: str) -> Any:
    """The torch type in which a model of this shape is computed here."""
    import torch

    half = torch.cuda.is_available() or (shape != "small" and computes_bf16())
    return torch.bfloat16 if half else torch.float32


def measure_matmul(run: StageRun, plan: dict[str, Any]) -> dict[str, Result]:
    """The chip, how many there are, and FLOPs a second in the fastest of five runs of large products."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, times = (8192, 100) if device == "cuda" else (512, 20)
    kind = precision(plan["shape"])
    left, right = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    best = math.inf
    for turn in range(6):
        synchronize()
        start = time.perf_counter()
        for _ in range(times):
            left @ right
        synchronize()
        if turn:  # the first one warms up
            best = min(best, (time.perf_counter() - start) / times)
    devices = torch.cuda.device_count()
    name = (
        f"{devices} × {torch.cuda.get_device_name()}"
        if devices
        else f"CPU, {torch.get_num_threads()} threads"
    )
    rate = 2 * size**3 / best
    return {"matmul": {"chip": name, "devices": devices, "rate": rate, "size": size, "type": str(kind)[6:]}}


def synchronize() -> None:
    """Wait until the GPU, if there is one, has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def draw_length(rng: random.Random, kind: str, mean: float | None = None) -> int:
    """A length of GSM8K's `prompt` or `answer`, stretched to a mean when one is given."""
    lengths = LENGTHS[kind]
    place = rng.random() * (len(lengths) - 1)
    low = int(place)
    length = lengths[low] + (place - low) * (lengths[low + 1] - lengths[low])
    return max(1, round(length * (mean / average(kind) if mean else 1)))


def average(kind: str) -> float:
    """The mean of what `draw_length` draws."""
    lengths = LENGTHS[kind]
    return sum(a + b for a, b in pairwise(lengths)) / 2 / (len(lengths) - 1)


def draw_tokens(rng: random.Random, count: int, shape: str) -> list[int]:
    """Random tokens, none of them special."""
    vocabulary = SHAPES[shape]["vocab_size"]
    return [rng.randrange(3, vocabulary) for _ in range(count)]


def build_policy(run: StageRun, shape: str) -> tuple[Any, Any]:
    """The base model with a random adapter on it, on this process's device, and a tokenizer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedTokenizerFast

    torch.manual_seed(run.params.seed)
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    config = MistralConfig(
        **SHAPES[shape], sliding_window=None, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=precision(shape))
    spec = run.params.sft.lora
    lora = LoraConfig(
        r=spec.r, lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(model, lora)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.01)
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, config.vocab_size))]
    word_level = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w3")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(word_level),
        bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left",
    )  # fmt: skip
    return model, tokenizer


# ---- generation ----------------------------------------------------------------------------------------


def build_requests(kind: str, run: StageRun, shape: str) -> list[Request]:
    """The requests of a whole rollout, greedy evaluation, or look at DPO's step."""
    params = run.params
    rng = random.Random(f"{params.seed}/{kind}")
    requests: list[Request] = []

    def add(name: str, prompt: tuple[int, ...], temperature: float, top_p: float = 1.0) -> None:
        limit = draw_length(rng, "answer", ANSWER_TOKENS)
        requests.append(Request(name, prompt, limit, temperature, top_p, request_seed(params.seed, name)))

    def prompt() -> tuple[int, ...]:
        return tuple(draw_tokens(rng, draw_length(rng, "prompt"), shape))

    if kind == "rollouts":
        for question in range(params.rollout.questions):
            by_style = {style: prompt() for style in params.prompt.styles}
            for name, arm in params.rollout.arms.items():
                add(f"{question}/{name}", by_style[arm.style], arm.temperature, arm.top_p)
    elif kind == "evaluation":
        for question in range(PLATINUM if shape == "abel-7b" else 24):
            add(f"{question}/greedy", prompt(), 0.0)
    else:
        for question in range(params.dpo.select.questions):
            words = prompt()
            for k in range(params.dpo.select.samples + 1):
                add(f"{question}/{k}", words, 1.0 if k else 0.0)
    return requests


def generate(run: StageRun, plan: dict[str, Any]) -> dict[str, Result]:
    """For each list of requests our engine's rate, and the seconds that the whole list takes at it.

    The lists share the time that is left once the engine has started: at least two fifths of the part's.
    """
    from stages.launch.devices import engine_kind

    fix_arithmetic(run.params.hardware.threads, run.params.seed)
    lists = {kind: build_requests(kind, run, plan["shape"]) for kind in plan["requests"]}
    results: dict[str, Result] = {}
    began = time.perf_counter()
    with open_bench_engine(run, plan) as engine:
        few = next(iter(lists.values()))[: 16 * plan["devices"]]
        for _ in engine.generate([Request(f"warm/{one.id}", one.prompt, 16) for one in few]):
            pass
        label = f"{engine_kind(run.params.hardware)}, started in {time.perf_counter() - began:.0f} s"
        left = max(plan["until"] - time.time(), 0.4 * plan["seconds"])
        for name, (kind, requests) in zip(plan["gives"], lists.items(), strict=True):
            rate = measure_engine(engine, requests, time.time() + plan["requests"][kind] * left)
            whole = sum(one.max_new_tokens for one in requests) / rate
            memory = memory_used() if plan["devices"] == 1 else {}
            results[name] = {"rate": rate, "whole": whole, "with": label, **memory}
    return results


@contextlib.contextmanager
def open_bench_engine(run: StageRun, plan: dict[str, Any]) -> Iterator[Engine]:
    """An engine around the model in memory. vLLM and engines on several devices load it from the disk instead."""
    from stages.engine.load import engine_around
    from stages.engine.open import open_engine
    from stages.launch.devices import engine_kind

    hardware = run.params.hardware
    if engine_kind(hardware) == "vllm" or plan["devices"] > 1:
        if not SFT_ADAPTER.exists():
            save_policy(run, plan["shape"])
        with open_engine(SFT_ADAPTER, hardware) as engine:
            yield engine
    else:
        model, tokenizer = build_policy(run, plan["shape"])
        yield engine_around(model.eval(), tokenizer, hardware)


def save_policy(run: StageRun, shape: str) -> None:
    """Write base, tokenizer and adapter where the stages have them; the GPU is free again afterwards."""
    import torch

    from stages.policy.adapter import adapter_config, adapter_weights, save_adapter

    model, tokenizer = build_policy(run, shape)
    weights, config = adapter_weights(model), adapter_config(model)
    model.unload().save_pretrained(BASE)
    tokenizer.save_pretrained(BASE)
    SFT_ADAPTER.mkdir(parents=True)
    save_adapter(weights, config, SFT_ADAPTER)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # what the engine takes is measured, not this model


def measure_engine(engine: Engine, requests: Sequence[Request], until: float) -> float:
    """New tokens a second over the whole list, or, when time runs out, after the first quarter of the time."""
    synchronize()
    start, seconds = time.perf_counter(), max(1.0, until - time.time())
    finished: list[tuple[float, int]] = []
    for completion in engine.generate(requests):
        tokens = len(completion.tokens) + (completion.finish == "stop")
        finished.append((time.perf_counter() - start, tokens))
        if finished[-1][0] > seconds:
            break
    else:
        if len(finished) < len(requests):
            raise RuntimeError(f"the engine gave {len(finished)} completions for {len(requests)} requests")
    end = finished[-1][0]
    opening = 0.0 if len(finished) == len(requests) else seconds / 4
    return sum(tokens for when, tokens in finished if when > opening) / (end - opening)


def generate_otherwise(run: StageRun, plan: dict[str, Any]) -> dict[str, Result]:
    """What `model.generate` does with the same requests, batch by batch; each list has its share of the time."""
    model, tokenizer = build_policy(run, plan["shape"])
    model.eval()
    pad, results = tokenizer.pad_token_id, {}
    for name, (kind, share) in zip(plan["gives"], plan["requests"].items(), strict=True):
        requests = build_requests(kind, run, plan["shape"])
        batches = plain_batches(requests, PLAIN_ROWS)
        random.Random(run.params.seed).shuffle(batches)  # there may be time for some of them only
        generate_plainly(model, [Request("warm", requests[0].prompt, 8)], pad, ends=())
        tokens, began = 0, time.perf_counter()
        for batch in batches:
            generate_plainly(model, batch, pad, ends=())
            tokens += sum(one.max_new_tokens for one in batch)
            if time.perf_counter() - began > share * plan["seconds"]:
                break
        rate = tokens / (time.perf_counter() - began)
        whole = sum(one.max_new_tokens for one in requests) / rate
        results[name] = {"rate": rate, "whole": whole, "with": f"{PLAIN_ROWS} rows", **memory_used()}
    return results


# ---- training ------------------------------------------------------------------------------------------


def train(run: StageRun, most_rows: int | None) -> None:
    """In one training process: steps for as long as the plan says; the first process writes what they gave."""
    import torch
    from transformers import PrinterCallback

    plan = read_json(run.work / PLAN)
    if not plan.get("defaults"):
        fix_arithmetic(run.params.hardware.threads, run.params.seed)
    model, tokenizer = build_policy(run, plan["shape"])
    weights = count_weights(model)
    if plan.get("padding_free"):
        from padding_free import without_padding

        without_padding(model)
    if plan.get("fused"):
        fuse_layers(model)
    clock = make_clock(plan["until"])
    trainer = make_trainer(run, plan, most_rows, model, tokenizer, clock)
    trainer.remove_callback(PrinterCallback)
    handle = model.register_forward_pre_hook(clock.count, with_kwargs=True)
    trainer.train()
    handle.remove()

    # Every process has counted its own rows.
    lengths = torch.cat([part.to(model.device, torch.float64) for part in clock.lengths])
    sums = torch.stack([lengths.sum(), (lengths**2).sum(), torch.tensor(len(lengths)).to(lengths)])
    counted = torch.tensor([clock.answered, clock.places], dtype=torch.float64, device=model.device)
    totals = trainer.accelerator.reduce(torch.cat([sums, counted]), reduction="sum").tolist()
    if not trainer.is_world_process_zero():
        return
    tokens, squares, rows, answered, places = totals
    if plan.get("padding_free"):
        places = tokens
    forward, training = row_flops(weights, tokens, squares, answered)
    dpo = plan["phase"] == "dpo"
    label = f"{trainer.args.per_device_train_batch_size} rows at once, {1 - tokens / places:.0%} padding"
    label += ", activations recomputed" if trainer.args.gradient_checkpointing else ""
    result = {
        "rate": (rows / 2 if dpo else tokens) / clock.seconds,
        "flops": training + (forward if dpo else 0),
        "seconds": clock.seconds,
        "processes": trainer.accelerator.num_processes,
        "with": f"{label}, {clock.steps} steps",
        **memory_used(),
    }
    write_json(run.work / RESULT, dict.fromkeys(plan["gives"], result))


def make_trainer(
    run: StageRun, plan: dict[str, Any], most_rows: int | None, model: Any, tokenizer: Any, clock: Any
) -> Any:
    """The trainer of the stage or TRL's own (`plain_trainer`), with the stage's arguments or TRL's (`defaults`)."""
    import torch
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from stages.dpo import pair_length
    from stages.launch.attempt import fit_rows
    from stages.sft import RowTrainer
    from stages.train.pair_trainer import PairTrainer
    from stages.train.trainer import BalancedTokens, trainer_arguments, training_set

    phase = plan["phase"]
    spec, seed = getattr(run.params, phase), run.params.seed
    rows = training_rows(phase, run, plan["shape"])
    if plan.get("defaults"):
        arguments = {"output_dir": str(run.work / "trainer"), "use_cpu": not torch.cuda.is_available()}
        data = Dataset.from_list(rows)
    else:
        lengths = [len(row["input_ids"]) if phase == "sft" else pair_length(row) for row in rows]
        fitting = fit_rows(run, spec, model, max(lengths), most_rows)
        arguments = trainer_arguments(spec, seed, model, fitting, run.work)
        if phase == "dpo":
            arguments |= {"beta": spec.beta, "loss_type": spec.loss_type, "loss_weights": spec.loss_weights}
        order = [0] * len(rows) if plan.get("unsorted") else lengths
        data = training_set(rows, order, spec, seed)
    arguments |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "num_train_epochs": 1000}
    arguments |= plan.get("arguments", {})
    common = {"model": model, "train_dataset": data, "processing_class": tokenizer, "callbacks": [clock]}
    plain = plan.get("plain_trainer")
    order = () if plan.get("defaults") else (BalancedTokens,)  # which rows are computed together
    if phase == "sft":
        config = SFTConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": True})
        return (type("PlainTrainer", (*order, SFTTrainer), {}) if plain else RowTrainer)(
            args=config, **common
        )
    as_tokens = {"_prepare_dataset": PairTrainer._prepare_dataset}
    if plain:
        return type("PlainPairTrainer", (*order, DPOTrainer), as_tokens)(
            args=DPOConfig(**arguments), **common
        )
    return PairTrainer(args=DPOConfig(**arguments), **common)


def fuse_layers(model: Any) -> None:
    """Compute norms and MLP of a PEFT model by Liger's kernels. Raises SystemExit without the package."""
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError:
        raise SystemExit("fused layers need the package liger-kernel (pip install liger-kernel)") from None
    only = {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}
    _apply_liger_kernel_to_instance(model.get_base_model(), rms_norm=True, swiglu=True, **only)


def training_rows(phase: str, run: StageRun, shape: str) -> list[dict[str, list[int]]]:
    """Rows as the stages tokenize them: SFT's with GSM8K's solutions, DPO's with answers of rollouts' length."""
    rng = random.Random(f"{run.params.seed}/{phase}")

    def answer(mean: float | None = None) -> list[int]:
        return [*draw_tokens(rng, draw_length(rng, "answer", mean) - 1, shape), 2]

    rows = []
    for _ in range(4000 if shape == "abel-7b" else 200):
        before = [1, *draw_tokens(rng, draw_length(rng, "prompt") - 1, shape)]
        if phase == "sft":
            after = answer()
            rows.append({"input_ids": before + after, "labels": [-100] * len(before) + after})
        else:
            sides = {side: answer(ANSWER_TOKENS) for side in ("chosen_ids", "rejected_ids")}
            rows.append({"prompt_ids": before, **sides})
    return rows


def count_weights(model: Any) -> dict[str, int]:
    """Weights in matrices that multiply each token: of the layers, the head and the adapter; layers times width."""
    sizes = {"layers": 0, "head": 0, "adapter": 0}
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "embed_tokens" not in name:
            kind = "adapter" if "lora_" in name else "head" if "lm_head" in name else "layers"
            sizes[kind] += weight.numel()
    config = model.config
    return {**sizes, "attention": config.num_hidden_layers * config.hidden_size}


def row_flops(weights: dict[str, int], tokens: float, squares: float, answered: float) -> tuple[float, float]:
    """FLOPs of a forward, and of LoRA training, over rows with these sums of L, L^2 and answer tokens.

    The formula is in this module's description.
    """
    matrices = 2 * (weights["layers"] * tokens + weights["head"] * answered)
    adapter, attention = 2 * weights["adapter"] * tokens, 2 * weights["attention"] * squares
    return matrices + adapter + attention, 2 * matrices + 3 * adapter + 3 * attention


def make_clock(until: float) -> Any:
    """A callback that times optimizer steps after the warm-up, counts their tokens, and ends training in time."""
    import torch
    from accelerate.utils import broadcast_object_list
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds, self.steps, self.start = 0.0, -WARM_UP_STEPS, 0.0
            self.forget()

        def forget(self) -> None:
            self.lengths: list[Any] = []
            self.answered, self.places = 0, 0

        def count(self, module: Any, args: Any, inputs: dict[str, Any]) -> None:
            """Before a forward pass of the policy. One of the reference has no gradients and is not counted."""
            if not torch.is_grad_enabled():
                return
            labels = inputs.get("labels")
            self.lengths.append(inputs["attention_mask"].sum(1).detach())
            self.places += inputs["input_ids"].numel()
            if labels is not None:  # else the head gets no credit
                self.answered = self.answered + (labels != -100).sum()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """After an optimizer step; the first process's clock decides for all of them."""
            synchronize()
            self.steps += 1
            if self.steps <= 0:
                self.start = time.perf_counter()
                self.forget()
                return
            self.seconds = time.perf_counter() - self.start
            over = [time.time() > until]
            broadcast_object_list(over)
            control.should_training_stop = over[0]

    return Clock()


if __name__ == "__main__":
    main()
