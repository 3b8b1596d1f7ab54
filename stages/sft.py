"""Supervised fine-tuning: teach the base model the clean solutions, as a LoRA adapter.

Every `select.steps` the policy answers validation problems, and the step with the best score is kept if it is really
better than the base policy. If none is, the zero step is kept: an adapter as it begins, which changes no answer.

prompt      <s> Question: Ann has 3 bags of 4 apples ... Answer:      (no loss)
completion  Ann starts with <<3*4=12>>12 apples. ... #### 10 </s>     (loss, the end token included)
"""

from __future__ import annotations

import random
from typing import Any

from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer

from stages.engine.load import engine_around
from stages.launch.attempt import fit_rows
from stages.launch.training import train_everywhere
from stages.policy.adapter import adapter_config, load_base
from stages.policy.context import Model, context_size, refuse_long
from stages.run.errors import UserError
from stages.run.files import read_jsonl
from stages.run.paths import BASE, KEPT, SFT_ADAPTER, SFT_CURVE, SFT_SELECTION, TRAIN, VALID
from stages.run.process import fix_arithmetic
from stages.run.resume import newest_checkpoint, step_of
from stages.run.stage import StageRun, stage_run
from stages.run.trackers import tracker_callbacks
from stages.stats.looks import kept_words
from stages.text.prompts import completion_ids, completion_text, prompt_ids
from stages.train.selection import Selection
from stages.train.trainer import (
    BalancedTokens,
    InputsAsTheyAre,
    Progress,
    assert_trainable,
    total_steps,
    trainer_arguments,
    training_set,
    write_curve,
)

CURVE_COLUMNS = {  # TRL's name: ours
    "loss": "loss",
    "mean_token_accuracy": "token_accuracy",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
}


class RowTrainer(BalancedTokens, InputsAsTheyAre, SFTTrainer):
    """TRL's trainer on rows that are already tokens."""


def main() -> None:
    """Train the SFT adapter from the base model and the training problems."""
    with stage_run(
        "sft",
        sections=("sft", "prompt", "seed"),
        inputs=[TRAIN, VALID, BASE],
        outputs=[SFT_ADAPTER, SFT_CURVE, SFT_SELECTION, KEPT / "sft.json"],
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
    config, trained = adapter_config(model), assert_trainable(model)

    # Training, from the newest complete checkpoint if an earlier run was interrupted.
    checkpoint = newest_checkpoint(run.work)
    lengths = [len(row["input_ids"]) for row in rows]
    rows_at_once = fit_rows(run, spec, model, max(lengths), most_rows)
    arguments = trainer_arguments(spec, seed, model, rows_at_once, run.work)
    with run.progress("training", total_steps(len(rows), spec), "steps", step_of(checkpoint)) as advance:
        trainer = RowTrainer(
            model=model,
            args=SFTConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": True}),
            train_dataset=training_set(rows, lengths, spec, seed),
            processing_class=tokenizer,
            callbacks=[Progress(advance), *tracker_callbacks(run.work)],
        )
        selection = Selection(
            run,
            "sft",
            tokenizer,
            config,
            lambda policy: engine_around(policy, tokenizer, run.params.hardware),
        )
        selection.train(trainer, checkpoint)

    # Outputs: the best step on validation, or the zero step.
    if not trainer.is_world_process_zero():
        return
    write_curve(trainer.state.log_history, CURVE_COLUMNS, SFT_CURVE)
    judged = selection.write(SFT_ADAPTER, SFT_SELECTION, KEPT / "sft.json", "the base policy")
    skipped = f", {too_long} longer than max_tokens left out" if too_long else ""
    run.finish(
        f"{len(rows):,} examples, {trainer.state.global_step} steps, {trained:,} parameters trained{skipped}; "
        f"{kept_words(judged)}"
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
