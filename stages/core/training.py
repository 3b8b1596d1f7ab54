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
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stages.core.errors import UserError
from stages.core.params import Dpo, Hardware, Sft
from stages.core.records import atomic_write

COMPLETE = "complete"  # written into a checkpoint once all of it is on the disk


def trainer_arguments(
    spec: Sft | Dpo, hardware: Hardware, seed: int, work: Path, model: Any
) -> dict[str, Any]:
    """Keyword arguments common to TRL's SFTConfig and DPOConfig.

    The global batch stays what the parameters say: micro-batches and accumulation follow from the number
    of processes. Raises UserError when it does not divide.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    micro = min(hardware.per_device_batch, spec.batch)
    if spec.batch % (micro * processes):
        raise UserError(
            f"a global batch of {spec.batch} does not divide over {processes} processes x "
            f"hardware.per_device_batch {micro}; change one of them"
        )
    return {
        "output_dir": str(work / "trainer"),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": spec.batch // (micro * processes),
        "num_train_epochs": spec.epochs,
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": spec.warmup_ratio,  # below 1 it is a share of all steps
        "max_grad_norm": 1.0,
        "seed": seed,
        "data_seed": seed,
        "bf16": next(model.parameters()).dtype == torch.bfloat16,
        "gradient_checkpointing": hardware.gradient_checkpointing,
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
        """Called after the trainer has written a checkpoint."""
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            for path in folder.rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
            (folder / COMPLETE).touch()


def newest_checkpoint(work: Path) -> Path | None:
    """The newest complete checkpoint of an interrupted run; all others are removed.

    Also older ones: a kill may have come while the trainer was deleting one, which makes it the youngest by
    its time of change, and the trainer keeps the youngest two.
    """
    found = list((work / "trainer").glob("checkpoint-*"))
    newest = max((folder for folder in found if (folder / COMPLETE).is_file()), key=step_of, default=None)
    for folder in found:
        if folder != newest:
            shutil.rmtree(folder)
    return newest


def step_of(checkpoint: Path | None) -> int:
    """The optimizer step a checkpoint folder was written at; 0 for none."""
    return int(checkpoint.name.split("-")[1]) if checkpoint else 0


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
