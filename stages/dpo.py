"""Direct preference optimisation of the adapter that a round starts from. Generated answers decide which step is kept.

The policy starts as that adapter, and so does its frozen reference (loss log 2 = 0.693 at step 0), unless
`dpo.reference` is `sft`. TRL's own "reward accuracy" can rise while the answers get worse. So every `select.steps` the
policy answers validation problems, and the step with the best score is kept if it is really better than the start.
"""

from __future__ import annotations

from pathlib import Path

from trl import DPOConfig

from stages.engine.load import engine_around
from stages.launch.attempt import fit_rows
from stages.launch.training import train_everywhere
from stages.policy.adapter import adapter_config, load_policy
from stages.run.errors import UserError
from stages.run.params import load_params
from stages.run.paths import BASE, SFT_ADAPTER, VALID, RoundPaths
from stages.run.process import fix_arithmetic
from stages.run.resume import newest_checkpoint, step_of
from stages.run.rounds import policy_of, shown
from stages.run.stage import StageRun, stage_run
from stages.run.trackers import tracker_callbacks
from stages.stats.looks import kept_words
from stages.train.pair_trainer import (
    PairTrainer,
    assert_reference,
    assert_same_start,
    set_reference,
)
from stages.train.pairs import build_rows, pair_length
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


def main(round_name: str) -> None:
    """Train a round's DPO adapter from its preference pairs."""
    own, start = RoundPaths(round_name), Path(load_params().rounds[round_name].start)
    with stage_run(
        "dpo",
        variant=round_name,
        sections=("dpo", "prompt", "rounds.${key}.dpo", "seed"),
        inputs=[own.pairs, VALID, BASE, *dict.fromkeys((start, SFT_ADAPTER))],
        outputs=[own.adapter, own.curve, own.selection, own.kept],
    ) as run:
        train_everywhere("stages.dpo:train", run, run.params.dpo.batch)


def train(run: StageRun, most_rows: int | None) -> None:
    """Train in this process, alone or as one of several; the first one writes the outputs.

    `most_rows` limits the rows of one forward pass (None: as many as fit).
    """
    spec, seed, own = run.params.dpo, run.params.seed, RoundPaths(run.variant)
    start = Path(load_params().rounds[run.variant].start)
    reference = start if spec.reference == "round" else SFT_ADAPTER
    fix_arithmetic(run.params.hardware.threads, seed)

    # Data: pairs as tokens.
    model, tokenizer = load_policy(start, trainable=True)
    rows, too_long = build_rows(own.pairs, spec.max_tokens, run.params.prompt, tokenizer)
    if not rows:
        raise UserError(
            f"{own.pairs}: no pair to train on ({too_long} were longer than dpo.max_tokens); "
            f"{own.preference} counts what was refused and why"
        )

    # Model: the adapter is trained further. TRL makes a frozen copy of it as the reference.
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
            callbacks=[Progress(advance), *tracker_callbacks(run.work)],
        )
        assert_trainable(model)
        assert_reference(model, start)
        assert_same_start(trainer, rows)
        set_reference(model, reference)
        selection = Selection(
            run,
            "dpo",
            tokenizer,
            config,
            lambda policy: engine_around(policy, tokenizer, run.params.hardware),
        )
        selection.train(trainer, checkpoint)
    assert_reference(model, reference)

    # Outputs: the best step on validation, or the SFT adapter.
    if not trainer.is_world_process_zero():
        return
    write_curve(trainer.state.log_history, CURVE_COLUMNS, own.curve)
    judged = selection.write(own.adapter, own.selection, own.kept, f"the {shown(policy_of(start))} adapter")
    run.finish(
        f"{len(rows):,} pairs, {trainer.state.global_step} steps, {trained:,} parameters trained; "
        f"{kept_words(judged)}"
    )
