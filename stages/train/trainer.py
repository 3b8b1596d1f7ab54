"""What SFT and DPO share around TRL's trainers: arguments, the order of rows, progress, curves."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft.helpers import disable_input_dtype_casting
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import BatchRebalanceSampler
from trl.trainer import utils as trl_utils

from stages.run.files import atomic_write
from stages.run.params import Dpo, Sft
from stages.run.resume import TRAINER, mark_complete

LENGTH = "length"  # the column with a row's tokens

# On a processor TRL (add_fused_lm_head) gives the prompts' tokens to the output layer too and drops what comes out;
# with Triton only the completions' tokens. Only this choice asks the name in this module.
trl_utils._use_triton = lambda device: True


@dataclass(frozen=True)
class Rows:
    """How each process goes through its share of a global batch."""

    micro_batch: int  # rows of one forward pass, on average
    accumulation: int  # forward passes of one optimizer step
    checkpointing: bool  # whether the backward pass recomputes activations


def trainer_arguments(spec: Sft | Dpo, seed: int, model: Any, rows: Rows, work: Path) -> dict[str, Any]:
    """Keyword arguments common to TRL's SFTConfig and DPOConfig; checkpoints go to a folder in `work`."""
    return {
        "output_dir": str(work / TRAINER),
        "per_device_train_batch_size": rows.micro_batch,
        "gradient_accumulation_steps": rows.accumulation,
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
        "gradient_checkpointing": rows.checkpointing,
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
    """The number of adapter parameters that will be trained. Raises RuntimeError if anything else is trainable."""
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    strangers = [name for name in trained if "lora_" not in name]
    if not trained or strangers:
        raise RuntimeError(f"the adapter alone must be trainable; found {strangers[:3] or 'nothing'}")
    return sum(trained.values())


class BalancedTokens:
    """Mixed into TRL's trainers: each process, in each pass, takes about as many tokens as any other, not rows.

    The rows of a global batch are sorted by length, so that little is padding, and cut where the padded sizes are most
    alike (transformers' BatchRebalanceSampler): a few long ones, or many short ones. Which rows share an optimizer step
    does not change. A batch that one process takes at once stays as it is: sorting would only round its sums otherwise.
    """

    args: TrainingArguments
    train_dataset: Any

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        passes, processes = self.args.gradient_accumulation_steps, self.args.world_size
        if passes * processes == 1:
            return super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        return BatchRebalanceSampler(
            lengths=self.train_dataset[LENGTH],
            effective_batch_size=self.args.train_batch_size * passes * processes,
            dp_size=processes,
            grad_accum=passes,
            shuffle=False,  # the training set is in order
            rank=self.args.process_index,
        )


class InputsAsTheyAre:
    """Mixed into TRL's trainers: under bf16 autocast, adapter layers take their inputs without a copy.

    PEFT would copy each input to 32 bits, the adapter's precision, and autocast would copy it back before the matrix
    product. Skipping both changes no number except which elements dropout draws, and saves a quarter of the memory
    traffic outside the matrix products. Generation runs without autocast and needs the copies.
    """

    model: Any
    args: TrainingArguments

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward pass of one micro-batch; see `transformers.Trainer`."""
        with disable_input_dtype_casting(self.model, active=self.args.bf16):
            return super().training_step(*args, **kwargs)  # type: ignore[misc]


class Progress(TrainerCallback):
    """Shows the steps, and marks each checkpoint as complete once it is on the disk."""

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
        """Advance the display by one optimizer step."""
        self.advance(1, self.note)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wait until every process has written its part of the checkpoint, then mark it."""
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            mark_complete(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")


def training_order(rows: int, batch: int, epochs: int, seed: int) -> list[int]:
    """The indices of the rows in the order of training: epoch after epoch, in whole global batches.

    Every epoch is shuffled with its own seed. The first rows are repeated to fill the last batch, because the trainer
    would fill it differently for each number of processes.
    """
    wanted = math.ceil(rows / batch) * batch
    order: list[int] = []
    for epoch in range(epochs):
        shuffled = torch.randperm(wanted, generator=torch.Generator().manual_seed(seed + epoch))
        order += [place % rows for place in shuffled.tolist()]
    return order


def training_set(rows: list[Any], lengths: list[int], spec: Sft | Dpo, seed: int) -> Dataset:
    """The rows of all epochs in the order of training, each with its length in tokens."""
    measured = [{**row, LENGTH: length} for row, length in zip(rows, lengths, strict=True)]
    return Dataset.from_list(measured).select(training_order(len(rows), spec.batch, spec.epochs, seed))


def total_steps(rows: int, spec: Sft | Dpo) -> int:
    """Optimizer steps of a whole run."""
    return math.ceil(rows / spec.batch) * spec.epochs


def write_curve(history: Sequence[Mapping[str, float]], columns: Mapping[str, str], path: Path) -> None:
    """Write the trainer's log as CSV: a column `step`, and one for each item (log key -> column name) of `columns`."""
    with atomic_write(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", *columns.values()])
        for row in history:
            if "loss" in row:
                writer.writerow([row["step"], *(row.get(key, "") for key in columns)])
