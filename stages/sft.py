"""Supervised fine-tuning: teach the base model the clean solutions, as a LoRA adapter.

prompt      <s> Question: Ann has 3 bags of 4 apples ... Answer:      (no loss)
completion  Ann starts with <<3*4=12>>12 apples. ... #### 10 </s>     (loss, the end token included)
"""

from __future__ import annotations

import random
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from stages.launch.attempt import fit_rows
from stages.launch.training import train_everywhere
from stages.policy.adapter import adapter_config, adapter_weights, load_base, save_adapter
from stages.policy.context import Model, context_size, refuse_long
from stages.run.errors import UserError
from stages.run.files import atomic_folder, read_jsonl
from stages.run.paths import BASE, SFT_ADAPTER, SFT_CURVE, TRAIN
from stages.run.process import fix_arithmetic
from stages.run.resume import newest_checkpoint, step_of
from stages.run.stage import StageRun, stage_run
from stages.text.prompts import completion_ids, completion_text, prompt_ids
from stages.train.trainer import (
    InputsAsTheyAre,
    Progress,
    assert_trainable,
    total_steps,
    trainer_arguments,
    training_set,
    write_curve,
)


class RowTrainer(InputsAsTheyAre, SFTTrainer):
    """TRL's trainer on rows that are already tokens."""


def main() -> None:
    """Train the SFT adapter from the base model and the training problems."""
    with stage_run(
        "sft", sections=("sft", "prompt", "seed"), inputs=[TRAIN, BASE], outputs=[SFT_ADAPTER, SFT_CURVE]
    ) as run:
        train_everywhere("stages.sft:train", run, run.params.sft.batch)


def train(run: StageRun, most_rows: int | None) -> None:
    """Train in this process, alone or as one of several; the first one writes the outputs.

    `most_rows` limits the rows of one forward pass (None: as many as fit).
    """
    spec, seed = run.params.sft, run.params.seed
    fix_arithmetic(run.params.hardware.threads, seed)

    # Data: a style for each problem, prompt and completion joined as tokens.
    model, tokenizer = load_base()
    asked = [(style, None) for style in spec.styles]
    problems = read_jsonl(TRAIN, {"id": str, "question": str})
    refuse_long(TRAIN, problems, asked, Model(tokenizer, context_size(model.config), run.params.prompt))
    rows, too_long = build_rows(run, tokenizer)
    if not rows:
        raise UserError(f"{TRAIN}: all {too_long} examples are longer than sft.max_tokens; raise it")

    # Model: a fresh adapter on every linear layer.
    lora = LoraConfig(
        r=spec.lora.r,
        lora_alpha=spec.lora.alpha,
        lora_dropout=spec.lora.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora)
    trained = assert_trainable(model)

    # Training, from the newest complete checkpoint if an earlier run was interrupted.
    checkpoint = newest_checkpoint(run.work)
    lengths = [len(row["input_ids"]) for row in rows]
    rows_at_once = fit_rows(run, spec, model, max(lengths), most_rows)
    arguments = trainer_arguments(spec, seed, model, rows_at_once, run.work)
    with run.progress("training", total_steps(len(rows), spec), "steps", step_of(checkpoint)) as advance:
        trainer = RowTrainer(
            model=model,
            args=SFTConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": True}),
            train_dataset=training_set(rows, lengths, spec, seed, rows_at_once.micro_batch),
            processing_class=tokenizer,
            callbacks=[Progress(advance)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    # Outputs.
    if not trainer.is_world_process_zero():
        return
    columns = {"loss": "loss", "mean_token_accuracy": "token_accuracy", "grad_norm": "grad_norm"}
    write_curve(trainer.state.log_history, {**columns, "learning_rate": "learning_rate"}, SFT_CURVE)
    with atomic_folder(SFT_ADAPTER) as folder:
        save_adapter(adapter_weights(model), adapter_config(model), folder)
    skipped = f", {too_long} longer than max_tokens left out" if too_long else ""
    run.finish(
        f"{len(rows):,} examples, {trainer.state.global_step} steps, {trained:,} parameters trained{skipped}"
    )


def build_rows(run: StageRun, tokenizer: Any) -> tuple[list[dict[str, list[int]]], int]:
    """The training rows as tokens (`input_ids`, and `labels` with -100 on the prompt), and how many were too long."""
    spec, prompt = run.params.sft, run.params.prompt
    rng = random.Random(f"{run.params.seed}/sft")
    problems = list(read_jsonl(TRAIN, {"question": str, "solution": str}))
    if spec.examples and spec.examples < len(problems):
        problems = rng.sample(problems, spec.examples)
    rows = []
    for problem in problems:
        before = prompt_ids(tokenizer, prompt, problem["question"], rng.choice(spec.styles))
        after = completion_ids(
            tokenizer, completion_text(prompt, problem["solution"]), opening=prompt.opening
        )
        if len(before) + len(after) <= spec.max_tokens:
            rows.append({"input_ids": before + after, "labels": [-100] * len(before) + after})
    return rows, len(problems) - len(rows)
