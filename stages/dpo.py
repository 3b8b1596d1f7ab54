"""Direct preference optimisation of the SFT adapter. Generated answers decide which checkpoint is kept.

The policy and its frozen reference both start as the SFT adapter (loss log 2 = 0.693 at step 0). TRL's own
"reward accuracy" can rise while the answers get worse. So every `select_steps` the policy answers validation problems,
and the step with the best score is kept. Step 0, the SFT adapter itself, is a candidate too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PrinterCallback
from trl import DPOConfig

from stages.engine.load import engine_around
from stages.launch.attempt import fit_rows
from stages.launch.training import train_everywhere
from stages.policy.adapter import adapter_config, load_policy, read_adapter, save_adapter
from stages.run.errors import UserError
from stages.run.files import atomic_folder, read_jsonl
from stages.run.paths import BASE, DPO_ADAPTER, DPO_CURVE, DPO_SELECTION, PAIRS, SFT_ADAPTER, VALID
from stages.run.process import fix_arithmetic
from stages.run.resume import newest_checkpoint, step_of
from stages.run.stage import StageRun, stage_run
from stages.text.prompts import completion_ids, prompt_ids
from stages.train.pair_trainer import PairTrainer, assert_reference, assert_same_start
from stages.train.selection import Selection
from stages.train.trainer import (
    Progress,
    assert_trainable,
    total_steps,
    trainer_arguments,
    training_set,
    write_curve,
)

CURVE_COLUMNS = {  # TRL's name: ours
    "loss": "loss",
    "rewards/margins": "reward_margin",
    "rewards/accuracies": "reward_accuracy",
    "logps/chosen": "logp_chosen",
    "logps/rejected": "logp_rejected",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
}


def main() -> None:
    """Train the DPO adapter from the preference pairs, starting at the SFT adapter."""
    with stage_run(
        "dpo",
        sections=("dpo", "prompt", "seed"),
        inputs=[PAIRS, VALID, BASE, SFT_ADAPTER],
        outputs=[DPO_ADAPTER, DPO_CURVE, DPO_SELECTION],
    ) as run:
        train_everywhere("stages.dpo:train", run, run.params.dpo.batch)


def train(run: StageRun, most_rows: int | None) -> None:
    """Train in this process, alone or as one of several; the first one writes the outputs.

    `most_rows` limits the rows of one forward pass (None: as many as fit).
    """
    spec, seed = run.params.dpo, run.params.seed
    fix_arithmetic(run.params.hardware.threads, seed)

    # Data: pairs as tokens.
    model, tokenizer = load_policy(SFT_ADAPTER, trainable=True)
    rows, too_long = build_rows(run, tokenizer)
    if not rows:
        raise UserError(
            f"{PAIRS}: no pair to train on ({too_long} were longer than dpo.max_tokens); "
            "metrics/preference.json counts what was refused and why"
        )

    # Model: the SFT adapter is trained further. TRL makes a frozen copy of it as the reference.
    config, trained = adapter_config(model), assert_trainable(model)

    # Training, from the newest complete checkpoint if an earlier run was interrupted.
    checkpoint = newest_checkpoint(run.work)
    lengths = [pair_length(row) for row in rows]
    rows_at_once = fit_rows(run, spec, model, max(lengths), most_rows)
    arguments = trainer_arguments(spec, seed, model, rows_at_once, run.work)
    with run.progress("training", total_steps(len(rows), spec), "steps", step_of(checkpoint)) as advance:
        trainer = PairTrainer(
            model=model,
            args=DPOConfig(
                **arguments, beta=spec.beta, loss_type=spec.loss_type, loss_weights=spec.loss_weights
            ),
            train_dataset=training_set(rows, lengths, spec, seed),
            processing_class=tokenizer,
            callbacks=[Progress(advance)],
        )
        assert_trainable(model)
        assert_reference(model, SFT_ADAPTER)
        assert_same_start(trainer, rows)
        selection = Selection(
            run, tokenizer, config, lambda policy: engine_around(policy, tokenizer, run.params.hardware)
        )
        selection.consider(model, step=0)
        trainer.add_callback(selection)
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        selection.consider(model, step=trainer.state.global_step)
    assert_reference(model, SFT_ADAPTER)

    # Outputs: the best step on validation.
    if not trainer.is_world_process_zero():
        return
    write_curve(trainer.state.log_history, CURVE_COLUMNS, DPO_CURVE)
    best = selection.write(DPO_SELECTION)
    with atomic_folder(DPO_ADAPTER) as folder:
        save_adapter(read_adapter(selection.folder(best["step"])), config, folder)
    kept = f"step {best['step']}" if best["step"] else "the SFT adapter: no step was better on validation"
    run.finish(
        f"{len(rows):,} pairs, {trainer.state.global_step} steps, {trained:,} parameters trained; kept {kept}"
    )


def build_rows(run: StageRun, tokenizer: Any) -> tuple[list[dict[str, list[int]]], int]:
    """The pairs as tokens (`prompt_ids`, `chosen_ids`, `rejected_ids`), and how many were too long.

    A rejected text that was cut off gets no end token, because the policy never wrote one.
    """
    spec, prompt = run.params.dpo, run.params.prompt
    rows, too_long = [], 0
    for pair in read_jsonl(PAIRS, {"prompt": str, "chosen": str, "rejected": str}):
        row = {
            "prompt_ids": prompt_ids(tokenizer, prompt, pair["prompt"]),
            "chosen_ids": completion_ids(tokenizer, pair["chosen"], opening=prompt.opening),
            "rejected_ids": completion_ids(
                tokenizer, pair["rejected"], pair.get("rejected_finish") != "length", prompt.opening
            ),
        }
        if pair_length(row) > spec.max_tokens:
            too_long += 1
        else:
            rows.append(row)
    return rows, too_long


def pair_length(row: Mapping[str, list[int]]) -> int:
    """Tokens of a pair's longer side, the prompt included."""
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
