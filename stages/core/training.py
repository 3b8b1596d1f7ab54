"""What SFT and DPO share around TRL's trainers: arguments, progress, resuming, curves."""

from __future__ import annotations

import csv
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from peft.helpers import disable_input_dtype_casting
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stages.core.devices import micro_batch
from stages.core.memory import training_rows
from stages.core.params import Dpo, Sft
from stages.core.processes import note_rows
from stages.core.records import atomic_write
from stages.core.stage import StageRun

COMPLETE = "complete"  # written into a checkpoint once all of it is on the disk


def trainer_arguments(spec: Sft | Dpo, run: StageRun, model: Any, longest: int) -> dict[str, Any]:
    """Keyword arguments common to TRL's SFTConfig and DPOConfig, for rows of at most `longest` tokens.

    The global batch stays what the parameters say: the rows a process takes at once and the accumulation
    follow from the number of processes, from `hardware` and from the memory there is.
    """
    hardware, seed = run.params.hardware, run.params.seed
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    limit, checkpointing = training_rows(model, spec, hardware, longest, processes, run.rows_limit)
    if processes > 1:
        PartialState(cpu=not torch.cuda.is_available())  # joins the other processes
        everyone = gather_object([(limit, checkpointing)])
        limit = min(rows for rows, _ in everyone)  # accumulation must be the same in all
        checkpointing = any(on for _, on in everyone)
    micro = micro_batch(spec.batch, processes, limit)
    note_rows(run, micro, checkpointing)
    return {
        "output_dir": str(run.work / "trainer"),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": spec.batch // (micro * processes),
        "ddp_find_unused_parameters": False,
        "num_train_epochs": 1,  # the training set holds all epochs, see `training_set`
        "train_sampling_strategy": "sequential",
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": spec.warmup_ratio,  # below 1 it is a share of all steps
        "max_grad_norm": 1.0,
        "seed": seed,
        "data_seed": seed,
        "bf16": next(model.parameters()).dtype == torch.bfloat16,
        "gradient_checkpointing": checkpointing,
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "steps",
        "save_steps": spec.checkpoint_steps,
        "save_total_limit": 2,
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "max_length": None,
    }


def assert_trainable(model: Any) -> int:
    """How many adapter parameters will be trained; raises RuntimeError unless it is those and nothing else."""
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    strangers = [name for name in trained if "lora_" not in name]
    if not trained or strangers:
        raise RuntimeError(f"the adapter alone must be trainable; found {strangers[:3] or 'nothing'}")
    return sum(trained.values())


class InputsAsTheyAre:
    """For TRL's trainers: under bf16 autocast, adapter layers take their inputs as they are.

    PEFT would copy each of them into 32 bits, the adapter's own precision, and autocast copy it back before the
    product. Without the detour no number differs, but for what dropout draws, and a quarter of the bytes that a
    block moves outside of its products is saved (bench/traffic.py). Generation has no autocast and needs the copies.
    """

    model: Any
    args: TrainingArguments

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of the rows that are taken at once; see `transformers.Trainer`."""
        with disable_input_dtype_casting(self.model, active=self.args.bf16):
            return super().training_step(*args, **kwargs)  # type: ignore[misc]


class Progress(TrainerCallback):
    """Shows steps, and marks a checkpoint complete once it is on the disk."""

    def __init__(self, advance: Callable[..., None]) -> None:
        self.advance = advance
        self.note = ""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the newest loss for the display."""
        logs = kwargs.get("logs") or {}
        if "loss" in logs:
            self.note = f"loss {float(logs['loss']):.4f}"

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One optimizer step further."""
        self.advance(1, self.note)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called after the trainer has written a checkpoint; every process writes a part of it."""
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            for path in folder.rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
            (folder / COMPLETE).touch()


def newest_checkpoint(work: Path) -> Path | None:
    """The newest complete checkpoint of an interrupted run; the first process removes all others.

    Also older ones: a kill may have come while the trainer was deleting one, which makes it the youngest by
    its time of change, and the trainer keeps the youngest two.
    """
    found = list((work / "trainer").glob("checkpoint-*"))
    newest = max((folder for folder in found if (folder / COMPLETE).is_file()), key=step_of, default=None)
    for folder in found:
        if folder != newest and os.environ.get("RANK", "0") == "0":
            shutil.rmtree(folder)
    return newest


def step_of(checkpoint: Path | None) -> int:
    """The optimizer step a checkpoint folder was written at; 0 for none."""
    return int(checkpoint.name.split("-")[1]) if checkpoint else 0


def training_order(lengths: Sequence[int], batch: int, epochs: int, seed: int, sort: bool) -> list[int]:
    """Which row is trained on when: places of rows, epoch after epoch, in whole global batches.

    Every epoch is shuffled anew, by seed. The first rows come again until the last batch is full, which each
    number of processes would else fill in its own way. With `sort`, the rows of each batch are put in order of
    length, so that those taken at once need little padding; which rows share a batch stays as it is.
    """
    wanted = math.ceil(len(lengths) / batch) * batch
    order: list[int] = []
    for epoch in range(epochs):
        shuffled = torch.randperm(wanted, generator=torch.Generator().manual_seed(seed + epoch))
        order += [place % len(lengths) for place in shuffled.tolist()]
    if not sort:
        return order
    batches = [order[at : at + batch] for at in range(0, len(order), batch)]
    return [place for one in batches for place in sorted(one, key=lengths.__getitem__)]


def training_set(
    rows: list[Any], lengths: list[int], spec: Sft | Dpo, run: StageRun, arguments: Mapping[str, Any]
) -> Dataset:
    """The rows of the whole run in the order they are trained on, for `trainer_arguments`.

    A batch that is taken at once keeps its order: sorting it would change nothing but the rounding.
    """
    in_parts = arguments["per_device_train_batch_size"] < spec.batch
    order = training_order(lengths, spec.batch, spec.epochs, run.params.seed, sort=in_parts)
    return Dataset.from_list(rows).select(order)


def total_steps(rows: int, spec: Sft | Dpo) -> int:
    """Optimizer steps of a whole run."""
    return math.ceil(rows / spec.batch) * spec.epochs


def write_curve(history: Sequence[Mapping[str, float]], columns: Mapping[str, str], path: Path) -> None:
    """Write the trainer's log as CSV for plots: `step` and, for each item of `columns`, log key -> column name."""
    with atomic_write(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", *columns.values()])
        for row in history:
            if "loss" in row:
                writer.writerow([row["step"], *(row.get(key, "") for key in columns)])
