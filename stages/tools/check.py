"""`python -m stages check`: what can be known before a run: files, memory, and every stage's first prompt.

Nothing runs and nothing is written: a wrong template or path, or a model too large for the GPU, is seen here,
before it costs a night.

    stage          needs      rows at once               fits
    sft            32.9 GiB   32                         yes
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core import memory
from stages.core.devices import micro_batch, training_processes
from stages.core.errors import UserError
from stages.core.memory import GIB, Device, Need, Shape
from stages.core.params import (
    BuiltModel,
    DirectoryModel,
    Dpo,
    FilesData,
    GeneratedData,
    HubModel,
    Params,
    Sft,
    load_params,
)
from stages.core.prompts import completion_text, prompt_messages, prompt_text
from stages.core.records import read_json, read_jsonl
from stages.engine.choose import NO_VLLM, engine_kind, engine_kinds

if TYPE_CHECKING:
    from rich.console import Console

TRAIN = Path("data/gsm8k/train.jsonl")
BASE = Path("checkpoints/base")
SCORER_FUNCTION = "score_group"
# Shown where there is no data yet and none can be made here.
SAMPLE = {
    "question": "Ann has 3 bags of 4 apples and eats 2. How many apples are left?",
    "answer": "There are <<3*4=12>>12 apples.\nAfter eating 2 there are <<12-2=10>>10.\n#### 10",
}


def main(console: Console | None = None, gpu_memory: float | None = None) -> None:
    """Check parameters, files, memory and prompts, and print what was found.

    `gpu_memory` (GiB) asks for GPUs of that size in place of what this machine has. Raises UserError for the
    first thing that is wrong, after all of them were listed.
    """
    from rich.console import Console

    console = console or Console()
    params = load_params()
    profile = f"profiles/{params.profile}.yaml"
    checks = [("params.yaml", ""), (profile, ""), *_engine_problem(params), *_files(params)]
    _print_checks(console, checks)
    problems = [f"{name}: {problem}" for name, problem in checks if problem]
    if problems:
        raise UserError(problems[0] + (f" (and {len(problems) - 1} more above)" if problems[1:] else ""))
    _print_memory(console, params, gpu_memory)
    example, origin = _example(params)
    tokenizer, note = _tokenizer(params)
    console.print(
        f"\nPrompts, filled with {origin}; what the model is given, then what it is to write", style="bold"
    )
    if note:
        console.print(note, markup=False, highlight=False)
    for title, text in _prompts(params, example, tokenizer):
        console.rule(title, align="left", style="dim")
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _print_checks(console: Console, checks: list[tuple[str, str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    table.add_column("checked")
    table.add_column("")
    for name, problem in checks:
        table.add_row(escape(name), f"[red]{escape(problem)}[/red]" if problem else "[green]OK[/green]")
    console.print(table)


def _engine_problem(params: Params) -> Iterator[tuple[str, str]]:
    """The engine that the profile names, if it names one, and whether it is missing."""
    if params.hardware.engine != "auto":
        missing = params.hardware.engine not in engine_kinds()
        yield "hardware.engine", NO_VLLM if missing else ""


def _files(params: Params) -> Iterator[tuple[str, str]]:
    """(what was looked at, what is wrong with it or '') for every file the parameters name."""
    scorer = Path(params.regime_w.scorer)
    yield f"regime_w.scorer {scorer}", _scorer_problem(scorer)
    if isinstance(params.data, FilesData):
        for name in ("train", "platinum"):
            path = Path(getattr(params.data, name))
            yield f"data.{name} {path}", "" if path.is_file() else "there is no such file"
    if isinstance(params.model, DirectoryModel):
        folder = Path(params.model.path)
        found = (folder / "config.json").is_file()
        yield (
            f"model.path {folder}",
            "" if found else "holds no config.json; name a model's folder as on the hub",
        )


# ---- Does it fit? ------------------------------------------------------------------------------------


def _print_memory(console: Console, params: Params, gpu_memory: float | None) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    devices = find_devices(params, gpu_memory)
    device = min(devices, key=lambda one: one.free)  # every process takes as many rows as the smallest can
    size = f"{device.free / GIB:.1f} GiB free of {device.total / GIB:.1f}"
    if gpu_memory:
        size = f"{gpu_memory:g} GiB"
    where = f"\n{_count(len(devices), 'process')} on {escape(device.name)}, {size}"
    console.print(where + _engine(params, device, gpu_memory), style="bold")
    try:
        shape = find_shape(params)
    except UserError as unknown:  # such a model may run all the same
        console.print(str(unknown), markup=False, highlight=False, soft_wrap=True)
        return
    if shape is None:
        console.print("What the stages need is known once the model's config is here: `dvc repro base`.")
        return
    table = Table(box=SIMPLE_HEAD)
    for title in ("stage", "needs", "rows at once", "fits"):
        table.add_column(title)
    for row in estimates(params, shape, device, len(devices)):
        table.add_row(*map(escape, row))
    console.print(table)


def _engine(params: Params, device: Device, gpu_memory: float | None) -> str:
    """What generates text, where that is known: not on a GPU that is not there."""
    kind: str = params.hardware.engine
    if kind == "auto" and gpu_memory:
        return ""
    if kind == "auto" and not device.cuda:
        kind = "transformers"  # torch need not be asked
    elif kind == "auto":
        kind = engine_kind(params.hardware, half=getattr(params.model, "dtype", "float32") != "float32")
    return f", engine {kind}"


def find_devices(params: Params, gpu_memory: float | None = None) -> list[Device]:
    """One for each process that this host will use; torch is asked only where there is a GPU's driver."""
    wanted = params.hardware.processes
    if gpu_memory:
        count = 1 if wanted == "auto" else wanted
        return [Device("GPU", True, int(gpu_memory * GIB), int(gpu_memory * GIB) - memory.CONTEXT)] * count
    if any(Path(driver).exists() for driver in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        import torch

        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        devices = []
        for index in range(found if wanted == "auto" else min(found, wanted)):
            free, total = torch.cuda.mem_get_info(index)
            devices.append(Device(torch.cuda.get_device_name(index), True, total, free))
        if devices:
            return devices
    count = 1 if wanted == "auto" else wanted
    return [memory.cpu_device(count)] * count


def find_shape(params: Params) -> Shape | None:
    """The base model's shape, from its config: of checkpoints/base, its folder, or the hub's cache; else None."""
    model = params.model
    if isinstance(model, BuiltModel):
        return memory.shape_of_built(model)
    places = []
    manifest = BASE / "manifest.json"
    if (
        manifest.is_file()
        and read_json(manifest)["params"]["model"] == params.model_dump(mode="json")["model"]
    ):
        places.append(BASE / "config.json")
    if isinstance(model, HubModel):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model.id, "config.json", revision=model.revision)
        places += [Path(cached)] if isinstance(cached, str) else []
    else:
        places.append(Path(model.path) / "config.json")
    for place in places:
        if place.is_file():
            return memory.shape_of_config({**read_json(place), "dtype": model.dtype}, str(place))
    return None


def estimates(params: Params, shape: Shape, device: Device, processes: int) -> Iterator[tuple[str, ...]]:
    """(stage, memory needed, rows at once and what follows, whether it fits) for every stage with a model."""
    lora = params.sft.lora
    for name, spec in (("sft", params.sft), ("dpo", params.dpo)):
        yield (name, *_training(params, spec, shape, device, processes))
    prompt = memory.PROMPT_TOKENS
    lengths = {"rollout": params.rollout.max_new_tokens, "evaluate": params.evaluate.max_new_tokens}
    for name, new in lengths.items():
        need = memory.generation_need(shape, lora.r, prompt, new)
        given = params.hardware.generation_batch
        rows = memory.generation_rows(need, device) if given == "auto" else given
        advice = "lower hardware.generation_batch" if rows > 1 else f"lower {name}.max_new_tokens"
        # vLLM and continuous batching fill what memory there is by themselves; then this is what one row needs.
        yield (name, f"{need.at(rows) / GIB:.1f} GiB", f"up to {rows}", _verdict(need, rows, device, advice))


def _training(
    params: Params, spec: Sft | Dpo, shape: Shape, device: Device, available: int
) -> tuple[str, str, str]:
    lora, hardware = params.sft.lora, params.hardware

    def need_of(checkpointing: bool) -> Need:
        dropout = lora.dropout > 0
        return memory.training_need(shape, spec, spec.max_tokens, lora.r, dropout, checkpointing, device.cuda)

    processes = training_processes(available, spec.batch)
    limit, checkpointing = memory.plan_training(need_of, spec, hardware, device.free, processes)
    need, rows = need_of(checkpointing), micro_batch(spec.batch, processes, limit)
    steps = spec.batch // (rows * processes)
    pairs = isinstance(spec, Dpo)
    follows = f"{rows} {'pairs' if pairs else 'rows'}"
    if processes > 1:
        follows += f" x {processes} processes"
    if steps > 1:
        follows += f" x {steps} passes"
    follows += f" = {spec.batch}" if steps * processes > 1 else ""
    follows += ", recomputing" if checkpointing else ""
    if rows > 1:
        advice = "lower hardware.per_device_batch"
    elif not checkpointing:
        advice = "set hardware.gradient_checkpointing: auto"
    else:
        advice = f"lower {'dpo' if pairs else 'sft'}.max_tokens"
    return f"{need.at(rows) / GIB:.1f} GiB", follows, _verdict(need, rows, device, advice)


def _verdict(need: Need, rows: int, device: Device, advice: str) -> str:
    if need.rows(device.free) >= rows:
        return "yes"
    if need.fixed > device.free * memory.USED:
        return f"no: {need.fixed / GIB:.1f} GiB before the first row; use a larger GPU"
    return f"no: {advice}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}es"


# ---- Files and prompts -------------------------------------------------------------------------------


def _scorer_problem(path: Path) -> str:
    """What is wrong with the scorer file. It is read, not run: it may be private, slow or unfinished."""
    try:
        tree = ast.parse(path.read_bytes())
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except (SyntaxError, ValueError) as error:
        return f"not valid Python ({error})"
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return "" if SCORER_FUNCTION in names else f"defines no {SCORER_FUNCTION}(question, trajectories)"


def _example(params: Params) -> tuple[dict[str, Any], str]:
    """A question with its gold solution, and where it comes from."""
    if TRAIN.is_file():
        for row in islice(read_jsonl(TRAIN, {"question": str, "answer": str}), 1):
            return row, f"the first row of {TRAIN}"
    if isinstance(params.data, FilesData):
        for row in islice(read_jsonl(Path(params.data.train), {"question": str, "answer": str}), 1):
            return row, f"the first row of {params.data.train}"
    if isinstance(params.data, GeneratedData):
        from stages.tiny.problems import problems

        problem = next(problems("train", params.seed))
        return {"question": problem.question, "answer": problem.answer}, "the first generated problem"
    return SAMPLE, "a sample question (run `dvc repro prepare` to see one of your own)"


def _tokenizer(params: Params) -> tuple[Any, str]:
    """The tokenizer whose chat template fills the prompts, or None and why there is none yet."""
    if not params.prompt.chat:
        return None, ""
    if not (BASE / "manifest.json").is_file():
        return (
            None,
            f"{BASE} is not there; the tokenizer applies its chat template after `base` ran. The messages",
        )
    if read_json(BASE / "manifest.json")["params"]["model"] != params.model_dump(mode="json")["model"]:
        return (
            None,
            f"{BASE} holds another model; the chat template comes with `dvc repro base`. The messages",
        )
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE, local_files_only=True)
    if not tokenizer.chat_template:
        raise UserError(
            f"prompt.chat: is true, but the tokenizer in {BASE} has no chat template; set chat: false"
        )
    return tokenizer, ""


def _prompts(params: Params, example: dict[str, Any], tokenizer: Any) -> Iterator[tuple[str, str]]:
    """(title, filled prompt) for every stage that builds one."""

    def filled(style: str | None = None, system: str | None = None) -> str:
        if not params.prompt.chat:
            return prompt_text(params.prompt, example["question"], style)
        messages = prompt_messages(params.prompt, example["question"], style, system)
        if tokenizer is None:
            return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    completion = completion_text(params.prompt, example["answer"]).removeprefix(params.prompt.opening)
    for style in dict.fromkeys(params.sft.styles):
        yield f"sft, style {style}: prompt", filled(style)
    yield "sft: completion (the end token follows)", completion
    arms: dict[tuple[str, str | None], list[str]] = {}
    for name, arm in params.rollout.arms.items():
        arms.setdefault((arm.style, arm.system or params.prompt.system), []).append(name)
    for (style, system), names in arms.items():
        yield f"rollout, style {style}: {', '.join(names)}", filled(style, system)
    yield f"dpo: style {params.prompt.default}", filled()
    yield f"evaluate: style {params.prompt.default}", filled()
