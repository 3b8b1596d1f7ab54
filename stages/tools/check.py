"""`python -m stages check`: finds mistakes before a run: in files, memory, disk space, and in the first prompts.

It runs no stage and leaves nothing behind. A wrong template or path, or a machine too small for the model, shows here
and not in the middle of the night.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import symtable
from collections.abc import Iterator
from dataclasses import replace
from itertools import takewhile
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from stages.launch import memory
from stages.launch.compiler import compiler_problem
from stages.launch.devices import engine_kind, micro_batch, training_processes
from stages.launch.memory import GIB, Device, Need, Shape
from stages.run.errors import UserError
from stages.run.files import read_json, read_jsonl
from stages.run.params import (
    BuiltModel,
    DirectoryModel,
    Dpo,
    FilesData,
    FileTest,
    GeneratedData,
    HubModel,
    Params,
    Sft,
    ShippedModel,
    load_params,
)
from stages.run.paths import BASE, SHIPPED, TRAIN, WORK
from stages.run.process import computes_bf16
from stages.run.stage import MANIFEST
from stages.stats.looks import questions_needed, visible_difference
from stages.text.prompts import completion_text, filled_template, prompt_messages, prompt_text
from stages.tools.model_check import find_model, long_questions
from stages.tools.show import EXAMPLE, new_console, new_table, raise_first

if TYPE_CHECKING:
    from stages.checkpoint.look import Found

NVIDIA, WINDOWS = Path("/dev/nvidiactl"), Path("/dev/dxg")  # one is there when a GPU has its driver
GB = 10**9
CHANGING = (0.15, 0.3)  # assumed share of validation questions whose verdict differs between two steps
SCORER_FUNCTION = "score_group"
SOLUTION = "There are <<3*4=12>>12 apples.\nAfter eating 2 there are <<12-2=10>>10.\n#### 10"


def main(gpu_memory: float | None = None) -> None:
    """Check parameters, files, memory, disks and prompts, and print what was found.

    `gpu_memory` (GiB) asks about GPUs of that size instead of this machine; its disks are then left out. Everything
    wrong is printed, and the first thing is raised as a UserError.
    """
    console = new_console()
    params = load_params()
    checks = [("params.yaml", ""), (f"profiles/{params.profile}.yaml", ""), *_files(params)]
    lines: list[str] = []  # what `base` will say
    found = None
    if isinstance(params.model, DirectoryModel | HubModel):
        found, refused = find_model(params.model, lines.append)
        checks += _model(params.model, found, refused)
    if not gpu_memory:
        checks += _gpu()
    table = new_table("checked", "")
    for name, problem in checks:
        table.add_row(name, Text(problem, "red") if problem else Text("OK", "green"))
    console.print(table)
    for line in lines:
        console.print(f"base will say: {line}", soft_wrap=True)
    raise_first([f"{name}: {problem}" for name, problem in checks if problem])

    problems = _print_needs(console, params, gpu_memory, found)
    _print_looks(console, params)
    shipped = SHIPPED if isinstance(params.model, ShippedModel) else None
    for line in long_questions(params, found, BASE if _base_is_made(params) else shipped):
        console.print(Text(line, "red"), soft_wrap=True)
        problems.append(line)

    example, origin = _example()
    tokenizer, note = _tokenizer(params, found)
    console.print(f"\nThe first prompts, filled with {origin}", style="bold")
    if note:
        console.print(note, soft_wrap=True)
    for title, text in _prompts(params, example, tokenizer):
        console.rule(title, align="left", style="dim")
        console.print(text, soft_wrap=True)
    raise_first(problems)


# ---- Files -------------------------------------------------------------------------------------------


def _files(params: Params) -> Iterator[tuple[str, str]]:
    """(what was checked, what is wrong with it or '') for every file the parameters name."""
    scorer = Path(params.regime_w.scorer)
    yield f"regime_w.scorer {scorer}", _scorer_problem(scorer)
    if isinstance(params.data, FilesData):
        for name in ("train", "platinum"):
            path = Path(getattr(params.data, name))
            yield f"own.{name} {path}", "" if path.is_file() else "there is no such file"
    for name, test in params.data.tests.items():
        if isinstance(test, FileTest):
            yield (
                f"data.tests.{name} {test.path}",
                "" if Path(test.path).is_file() else "there is no such file",
            )


def _model(
    spec: DirectoryModel | HubModel, found: Found | None, refused: UserError | None
) -> Iterator[tuple[str, str]]:
    """The same for the model; nothing while it is not here."""
    if found or refused:
        key, name = ("own.model", spec.path) if isinstance(spec, DirectoryModel) else ("model.id", spec.id)
        yield f"{key} {name}", str(refused or "").removeprefix(f"{name}: ")


def _scorer_problem(path: Path) -> str:
    """What is wrong with the scorer file. It is read, not run: it may be private, slow or unfinished."""
    try:
        names = symtable.symtable(path.read_text(encoding="utf-8"), str(path), "exec").get_identifiers()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except (SyntaxError, ValueError) as error:
        return f"not valid Python ({error})"
    return "" if SCORER_FUNCTION in names else f"defines no {SCORER_FUNCTION}(question, trajectories)"


# ---- Memory ------------------------------------------------------------------------------------------


def _gpu() -> Iterator[tuple[str, str]]:
    """Whether torch can use the GPU whose driver is here, and build for it. Nothing where GPUs are hidden by intent."""
    if NVIDIA.exists() and "CUDA_VISIBLE_DEVICES" not in os.environ:
        import torch

        built = f"torch {torch.__version__}, built for CUDA {torch.version.cuda},"
        usable = torch.cuda.is_available()
        yield "GPU", "" if usable else f"{built} finds none, though the driver is here (docs/rented-host.md)"
        if usable:
            yield "GPU kernels", compiler_problem()


def _print_needs(
    console: Console, params: Params, gpu_memory: float | None, found: Found | None
) -> list[str]:
    """Print what the run needs and what is there; return one line for each disk or memory that is too small."""
    devices = find_devices(params, gpu_memory)
    device = min(devices, key=lambda one: one.free)  # all processes take the rows that fit on the fullest one
    processes = "1 process" if len(devices) == 1 else f"{len(devices)} processes"
    size = f"{device.free / GIB:.1f} GiB free of {device.total / GIB:.1f}"
    # Nobody knows which engine is installed on another machine.
    unknown = gpu_memory and params.hardware.engine == "auto"
    engine = "" if unknown else f", engine {engine_kind(params.hardware)}"
    console.print(f"\n{processes} on {device.name}, {size}{engine}", style="bold")
    try:
        shape = find_shape(params, found)
    except UserError as error:  # such a model may run all the same
        console.print(str(error), soft_wrap=True)
        return []
    if shape is None:
        console.print(
            "How much memory and disk the run needs is known once the model's config is here: `dvc repro base`, "
            "which looks for enough disk space before it downloads the model.",
            soft_wrap=True,
        )
        return []
    table = new_table("stage", "needs", "rows at once", "fits")
    for row in estimates(params, shape, device, len(devices)):
        table.add_row(*row)
    console.print(table)
    if gpu_memory:
        return []
    table, too_little = new_table("room for", "needs", "free", "fits"), []
    for what, need, free in needed_room(params, shape, devices):
        needed, there = f"{need / GB:.1f} GB", f"{free / GB:.1f} GB"
        table.add_row(what, needed, there, "yes" if free >= need else "no")
        if free < need:
            too_little.append(f"{what}: {needed} are needed and {there} are free (docs/rented-host.md)")
    console.print(table)
    return too_little


def find_devices(params: Params, gpu_memory: float | None = None) -> list[Device]:
    """The device of each process that this host will start. torch is only imported where a GPU's driver is."""
    wanted = params.hardware.processes
    count = 1 if wanted == "auto" else wanted
    if gpu_memory:
        total = int(gpu_memory * GIB)
        return [Device("GPU", True, total, total - memory.CONTEXT)] * count
    if NVIDIA.exists() or WINDOWS.exists():
        import torch

        gpus = torch.cuda.device_count()
        devices = []
        for index in range(gpus if wanted == "auto" else min(gpus, wanted)):
            free, total = torch.cuda.mem_get_info(index)
            devices.append(Device(torch.cuda.get_device_name(index), True, total, free))
        if devices:
            return devices
    return [memory.cpu_device(count)] * count


def _base_is_made(params: Params) -> bool:
    """Whether checkpoints/base holds the model that the profile names."""
    manifest = BASE / MANIFEST
    return (
        manifest.is_file()
        and read_json(manifest)["params"]["model"] == params.model_dump(mode="json")["model"]
    )


def find_shape(params: Params, found: Found | None = None) -> Shape | None:
    """The base model's shape: of the model `found`, else by the config in checkpoints/base, its folder, or the hub's
    cache. None without one.
    """
    model = params.model
    if found:
        return memory.shape_of_config(found.model.config.to_dict(), "the model's config.json")
    if isinstance(model, BuiltModel):
        return memory.shape_of_built(model)
    places = [BASE / "config.json"] if _base_is_made(params) else []
    dtype = "float32" if isinstance(model, ShippedModel) else model.dtype
    if isinstance(model, ShippedModel):
        places.append(SHIPPED / "config.json")
    elif isinstance(model, HubModel):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model.id, "config.json", revision=model.revision)
        places += [Path(cached)] if isinstance(cached, str) else []
    for place in places:
        if place.is_file():
            return memory.shape_of_config({**read_json(place), "dtype": dtype}, str(place))
    return None


def estimates(params: Params, shape: Shape, device: Device, processes: int) -> Iterator[tuple[str, ...]]:
    """(its section, memory it needs, rows at once, whether it fits) for every stage that uses a model."""
    if not device.cuda and not computes_bf16():
        shape = replace(shape, width=4)  # it is stored in the profile's precision, and loaded in 32 bits
    for key, spec in {"sft": params.sft, **params.by_key("dpo")}.items():
        yield (key, *_training(params, spec, shape, device, processes))
    lengths = {key: spec.max_new_tokens for key, spec in params.by_key("rollout").items()}
    lengths["evaluate"] = params.evaluate.max_new_tokens
    for key, new in lengths.items():
        need = memory.generation_need(shape, params.sft.lora.r, memory.PROMPT_TOKENS, new)
        given = params.hardware.generation_batch
        rows = memory.generation_rows(need, device) if given == "auto" else given
        advice = "lower hardware.generation_batch" if rows > 1 else f"lower {key}.max_new_tokens"
        # vLLM fills all memory it is given; for it this is the least that it needs.
        yield (key, f"{need.at(rows) / GIB:.1f} GiB", f"up to {rows}", _verdict(need, rows, device, advice))


def _training(
    params: Params, spec: Sft | Dpo, shape: Shape, device: Device, available: int
) -> tuple[str, str, str]:
    lora, hardware = params.sft.lora, params.hardware

    def need_of(checkpointing: bool) -> Need:
        dropout = lora.dropout > 0
        return memory.training_need(shape, spec, spec.max_tokens, lora.r, dropout, checkpointing, device.cuda)

    processes = training_processes(available, spec.batch)
    limit, checkpointing = memory.rows_and_checkpointing(need_of, spec, hardware, device.free, processes)
    need, rows = need_of(checkpointing), micro_batch(spec.batch, processes, limit)
    passes = spec.batch // (rows * processes)
    pairs = isinstance(spec, Dpo)
    taken = f"{rows} {'pairs' if pairs else 'rows'}"
    if processes > 1:
        taken += f" x {processes} processes"
    if passes > 1:
        taken += f" x {passes} passes"
    if processes * passes > 1:
        taken += f" = {spec.batch}"
    if checkpointing:
        taken += ", recomputing"
    if rows > 1:
        advice = "lower hardware.per_device_batch"
    elif not checkpointing:
        advice = "set hardware.gradient_checkpointing: auto"
    else:
        advice = f"lower {'dpo' if pairs else 'sft'}.max_tokens"
    return f"{need.at(rows) / GIB:.1f} GiB", taken, _verdict(need, rows, device, advice)


def _verdict(need: Need, rows: int, device: Device, advice: str) -> str:
    if need.rows(device.free) >= rows:
        return "yes"
    if need.fixed > device.free * memory.USED:
        return f"no: {need.fixed / GIB:.1f} GiB before the first row; use a larger GPU"
    return f"no: {advice}"


# ---- Room on the disks, and in the host's memory ------------------------------------------------------


def needed_room(params: Params, shape: Shape, devices: list[Device]) -> Iterator[tuple[str, int, int]]:
    """(what for, bytes still needed, bytes free) for every disk that the run writes to, and for the host's memory.

    Only what is certain is counted, so too little room is an error. Not counted: the download, whose size only the
    hub knows (`base` asks for it and looks at the disk first), and the texts, which are small beside the weights.
    """
    model = shape.parameters() * shape.width
    adapter = shape.adapter_parameters(params.sft.lora.r) * 4
    new = 0 if _base_is_made(params) else model
    converted = sum(file.stat().st_size for file in (WORK / "base").rglob("*") if file.is_file())
    cache, linked = _dvc_cache()
    # The adapters, and DVC's copies. While DPO saves, three checkpoints: with the reference and Adam's two averages.
    training = ((1 + len(params.rounds)) * 2 + 3 * (2 + 2)) * adapter
    disks: dict[int, tuple[list[str], int, int]] = {}
    for what, place, bytes_ in (
        ("base model", BASE, max(0, new - converted)),
        ("DVC's copy", cache, 0 if linked else new),
        ("training", WORK, training),
    ):
        if bytes_:
            folder = _existing(place)
            names, total, _ = disks.get(folder.stat().st_dev, ([], 0, 0))
            disks[folder.stat().st_dev] = ([*names, what], total + bytes_, shutil.disk_usage(folder).free)
    for names, total, free in disks.values():
        yield f"disk: {', '.join(names)}", total, free
    if devices[0].cuda:  # on a CPU, the stages' own estimates say it
        what = "memory: base model, on its way to each GPU"
        yield what, len(devices) * model, memory.cpu_device(1).free


def _existing(path: Path) -> Path:
    """The deepest folder on the way to `path` that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


def _dvc_cache() -> tuple[Path, bool]:
    """DVC's cache, and whether a file there and its twin among the outputs take room once (tried out, as DVC does)."""
    from dvc.config import Config, ConfigError
    from dvc.fs import localfs
    from dvc_objects.fs.generic import test_links

    try:
        settings = Config(".dvc")["cache"]
    except ConfigError as error:
        raise UserError(f"DVC: {error}") from None
    cache = Path(settings.get("dir", ".dvc/cache"))
    kinds = list(takewhile(lambda kind: kind != "copy", settings.get("type", ["reflink"])))
    with (
        contextlib.suppress(OSError),  # a folder that cannot be written
        TemporaryDirectory(dir=_existing(cache), suffix=".tmp") as there,
        TemporaryDirectory(dir=".", suffix=".tmp") as here,
    ):
        return cache, bool(test_links(kinds, localfs, there, localfs, f"{here}/file"))
    return cache, False


# ---- What validation can show --------------------------------------------------------------------------


def _print_looks(console: Console, params: Params) -> None:
    """Print how many validation questions show a gain, and what as many as the profile asks can show."""
    gains = (0.02, 0.05, 0.1)
    shown = (f"{100 * gain:.0f} points" for gain in gains)
    table = new_table("stage", "looks", *shown, "asked", "show")
    for name, looks in _looks(params).items():
        spec = getattr(params, name).select
        asked = min(spec.questions, params.data.valid)
        if spec.level == 1:  # no test decides
            table.add_row(name, str(looks), *["any"] * len(gains), f"{asked:,}", "any")
            continue
        needed = [
            "–".join(f"{questions_needed(gain, share, spec.level, looks):,}" for share in CHANGING)
            for gain in gains
        ]
        seen = [visible_difference(asked, share, spec.level, looks) for share in CHANGING]
        words = "–".join("none" if one is None else f"{100 * one:.0f}" for one in seen)
        table.add_row(name, str(looks), *needed, f"{asked:,}", f"{words} points")
    console.print("\nValidation questions that show a gain, so that a step is kept over step 0", style="bold")
    low, high = (f"{100 * share:.0f}" for share in CHANGING)
    console.print(table)
    console.print(
        f"With power 80 %, one-sided, at select.level divided by the looks, if {low}–{high} % of the answers change "
        "(Connor 1987). Samples beside the greedy answer make it a little easier.",
        soft_wrap=True,
    )


def _looks(params: Params) -> dict[str, int]:
    """The looks after step 0 of each training, for dpo at most; none of what depends on files not here yet."""
    train = params.data.train if isinstance(params.data, GeneratedData) else None
    if TRAIN.is_file():
        train = sum(1 for _ in read_jsonl(TRAIN))
    kinds = (params.preference.correctness, params.preference.coherence)
    asked = params.rollout.questions or train
    rows = {
        "sft": params.sft.examples or train,
        "dpo": asked and asked * sum(kind.per_question for kind in kinds),
    }
    looks = {}
    for name, count in rows.items():
        if count:
            spec = getattr(params, name)
            looks[name] = ceil(ceil(count / spec.batch) * spec.epochs / spec.select.steps)
    return looks


# ---- Prompts -----------------------------------------------------------------------------------------


def _example() -> tuple[dict[str, Any], str]:
    """A question with its gold solution, and where it comes from."""
    sample = {"question": EXAMPLE, "solution": SOLUTION}
    if TRAIN.is_file():
        rows = read_jsonl(TRAIN, {"question": str, "solution": str})
        return next(rows, sample), f"the first row of {TRAIN}"
    return sample, "a sample question (run `dvc repro prepare` to see one of your own)"


def _tokenizer(params: Params, found: Found | None) -> tuple[Any, str]:
    """The tokenizer whose chat template fills the prompts, or None and why there is none yet."""
    if not params.prompt.chat:
        return None, ""
    if found:
        tokenizer = found.tokenizer
    elif _base_is_made(params):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(BASE, local_files_only=True)
    else:
        state = "holds another model" if (BASE / MANIFEST).is_file() else "is not there"
        return (
            None,
            f"{BASE} {state}: run `dvc repro base` to see these messages in the model's chat template.",
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
        return filled_template(tokenizer, messages)

    completion = completion_text(params.prompt, example["solution"]).removeprefix(params.prompt.opening)
    for style in dict.fromkeys(params.sft.styles):
        yield f"sft, style {style}: prompt", filled(style)
    yield "sft: completion (the end token follows)", completion
    arms: dict[tuple[str, str | None], list[str]] = {}
    for name, arm in (one for spec in params.by_key("rollout").values() for one in spec.arms.items()):
        arms.setdefault((arm.style, arm.system or params.prompt.system), []).append(name)
    for (style, system), names in arms.items():
        yield f"rollout, style {style}: {', '.join(names)}", filled(style, system)
    yield f"dpo: style {params.prompt.default}", filled()
    yield f"evaluate: style {params.prompt.default}", filled()
