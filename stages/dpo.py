"""Direct preference optimisation of the SFT adapter, its checkpoint chosen by generated answers.

The policy and its frozen reference both start as the SFT adapter (loss log 2 = 0.693 at step 0). TRL's own
"reward accuracy" can rise while the answers get worse, so every `select_steps` the policy answers
validation problems, and the step with the best score is kept. Step 0, the SFT adapter itself, competes.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import use_adapter

from stages.core.answers import read_answer, same_answer
from stages.core.errors import UserError
from stages.core.launch import fix_arithmetic
from stages.core.paths import BASE, DPO_ADAPTER, SFT_ADAPTER
from stages.core.policy import adapter_config, adapter_weights, load_policy, read_adapter, save_adapter
from stages.core.processes import train_everywhere
from stages.core.prompts import completion_ids, prompt_ids
from stages.core.records import atomic_write, read_json, read_jsonl, write_json
from stages.core.stage import StageRun, atomic_folder, stage_run
from stages.core.training import (
    InputsAsTheyAre,
    Progress,
    assert_trainable,
    newest_checkpoint,
    step_of,
    total_steps,
    trainer_arguments,
    training_set,
    write_curve,
)
from stages.engine.base import Request, request_seed
from stages.engine.choose import make_engine

PAIRS = Path("data/coherence_preferences.jsonl")
VALID = Path("data/gsm8k/valid.jsonl")
CURVE = Path("metrics/curves/dpo.csv")
SELECTION = Path("metrics/curves/dpo_selection.csv")
COLUMNS = {
    "loss": "loss",
    "rewards/margins": "reward_margin",
    "rewards/accuracies": "reward_accuracy",
    "logps/chosen": "logp_chosen",
    "logps/rejected": "logp_rejected",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
}


class PairTrainer(InputsAsTheyAre, DPOTrainer):
    """TRL's trainer on pairs that are already tokens, so that training and generation share the border."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


def main() -> None:
    """Train the DPO adapter from the preference pairs, starting at the SFT adapter."""
    with stage_run(
        "dpo",
        sections=("dpo", "prompt", "seed"),
        inputs=[PAIRS, VALID, BASE, SFT_ADAPTER],
        outputs=[DPO_ADAPTER, CURVE, SELECTION],
    ) as run:
        train_everywhere("stages.dpo:train", run, run.params.dpo.batch)


def train(run: StageRun) -> None:
    """Train in this process, alone or as one of several; the first one writes the outputs."""
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

    # Model: the adapter goes on training; TRL makes a frozen copy of it as the reference.
    config = adapter_config(model)
    trained = assert_trainable(model)
    checkpoint = newest_checkpoint(run.work)
    lengths = [pair_length(row) for row in rows]
    arguments = trainer_arguments(spec, run, model, max(lengths))
    with run.progress("training", total_steps(len(rows), spec), "steps", step_of(checkpoint)) as advance:
        trainer = PairTrainer(
            model=model,
            args=DPOConfig(
                **arguments,
                beta=spec.beta,
                loss_type=list(spec.loss_type),
                loss_weights=list(spec.loss_weights),
            ),
            train_dataset=training_set(rows, lengths, spec, run, arguments),
            processing_class=tokenizer,
            callbacks=[Progress(advance)],
        )
        assert_trainable(model)
        assert_reference(model, SFT_ADAPTER)
        assert_same_start(trainer, rows)
        selection = Selection(run, tokenizer, config)
        selection.consider(model, step=0)
        trainer.add_callback(selection)
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        selection.consider(model, step=trainer.state.global_step)
    assert_reference(model, SFT_ADAPTER)

    # Outputs: the best step on validation.
    if not trainer.is_world_process_zero():
        return
    write_curve(trainer.state.log_history, COLUMNS, CURVE)
    best = selection.write(SELECTION)
    with atomic_folder(DPO_ADAPTER) as folder:
        save_adapter(read_adapter(selection.folder(best["step"])), config, folder)
    kept = f"step {best['step']}" if best["step"] else "the SFT adapter: no step was better on validation"
    run.say(
        f"{len(rows):,} pairs, {trainer.state.global_step} steps, {trained:,} parameters trained; kept {kept}"
    )


def build_rows(run: StageRun, tokenizer: Any) -> tuple[list[dict[str, list[int]]], int]:
    """Tokenized pairs (`prompt_ids`, `chosen_ids`, `rejected_ids`), and how many were too long.

    A rejected text that was cut off gets no end token: the policy never wrote one.
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


def assert_reference(model: Any, sft_adapter: Path) -> None:
    """Raise RuntimeError unless the frozen reference equals the saved SFT adapter, tensor by tensor."""
    reference = adapter_weights(model, "ref")
    for name, wanted in read_adapter(sft_adapter).items():
        if not torch.equal(reference[name], wanted):
            raise RuntimeError(f"the DPO reference is not the SFT adapter: {name} differs")


def assert_same_start(trainer: Any, rows: list[dict[str, list[int]]]) -> None:
    """Raise RuntimeError unless policy and reference give the first pairs the same log-probabilities."""
    batch = trainer._prepare_inputs(trainer.data_collator(rows[:4]))
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)

    def logprobs() -> torch.Tensor:
        with torch.no_grad():
            logits = trainer.model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits
        return -torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:])

    trainer.model.eval()
    policy = logprobs()
    with use_adapter(trainer.model, adapter_name="ref"):
        reference = logprobs()
    trainer.model.train()
    if not torch.allclose(policy, reference, atol=1e-5):
        raise RuntimeError(f"DPO must start at its reference; log-probabilities are {policy} and {reference}")


class Selection(TrainerCallback):
    """Answers validation problems as training goes, and keeps the adapter that answers best.

    The score of a step is the mean of its greedy accuracy and its mean accuracy over samples, so that a
    policy is not taken for its lucky greedy answers alone. A later step must be better than an earlier one.
    """

    def __init__(self, run: StageRun, tokenizer: Any, config: dict[str, Any]) -> None:
        self.run, self.tokenizer, self.config = run, tokenizer, config
        self.spec, self.prompt = run.params.dpo, run.params.prompt
        self.state = PartialState()
        self.rows_file = run.work / "selection.json"
        self.rows: dict[int, dict[str, Any]] = {}
        if self.rows_file.is_file():
            self.rows = {row["step"]: row for row in read_json(self.rows_file)}
        valid = read_jsonl(VALID, {"id": str, "question": str, "gold": str})
        self.problems = list(islice(valid, self.spec.select_questions))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Every `select_steps` optimizer steps."""
        if state.global_step % self.spec.select_steps == 0:
            self.consider(kwargs["model"], state.global_step)

    def consider(self, model: Any, step: int) -> None:
        """Score the adapter as it is now; keep it when no earlier step did as well."""
        if step in self.rows:
            return
        row = {"step": step, **self._score(model)}
        best = self.best()
        self.rows[step] = row
        if self.state.is_main_process:
            if best is None or row["score"] > best["score"]:
                with atomic_folder(self.folder(step)) as folder:
                    save_adapter(adapter_weights(model), self.config, folder)
            write_json(self.rows_file, [self.rows[key] for key in sorted(self.rows)])

    def best(self) -> dict[str, Any] | None:
        """The best row so far; the earliest among equals."""
        return max(self.rows.values(), key=lambda row: (row["score"], -row["step"]), default=None)

    def folder(self, step: int) -> Path:
        """Where the adapter of a step is kept while training goes on."""
        return self.run.work / "selected" / f"step-{step}"

    def write(self, path: Path) -> dict[str, Any]:
        """Write the curve; returns the best row."""
        best = self.best()
        assert best is not None, "step 0 is always considered"
        with atomic_write(path) as file:
            file.write("step,valid_accuracy,valid_mean,score\n")
            for step in sorted(self.rows):
                row = self.rows[step]
                file.write(f"{step},{row['accuracy']},{row['mean']},{row['score']}\n")
        return best

    def _score(self, model: Any) -> dict[str, float]:
        """Accuracy of greedy answers and of samples; each process answers its share of the problems."""
        requests, golds = [], {}
        for problem in self.problems[self.state.process_index :: self.state.num_processes]:
            prompt = tuple(prompt_ids(self.tokenizer, self.prompt, problem["question"]))
            for k in range(self.spec.select_samples + 1):
                seed = request_seed(self.run.params.seed, "select", problem["id"], str(k))
                temperature = 1.0 if k else 0.0
                request = Request(
                    f"{problem['id']}/{k}", prompt, self.spec.select_max_new_tokens, temperature, seed=seed
                )
                requests.append(request)
                golds[request.id] = problem
        right: list[tuple[bool, bool]] = []  # whether greedy, whether correct
        with torch.no_grad():
            for completion in make_engine(model, self.tokenizer, self.run.params.hardware).generate(requests):
                problem = golds[completion.id]
                written = self.tokenizer.decode(completion.tokens, skip_special_tokens=True)
                text = self.prompt.opening + written
                answer = read_answer(text, problem["question"]).answer
                right.append((completion.id.endswith("/0"), same_answer(answer, problem["gold"])))
        everyone = gather_object(right) if self.state.num_processes > 1 else right
        greedy = [correct for is_greedy, correct in everyone if is_greedy]
        drawn = [correct for is_greedy, correct in everyone if not is_greedy]
        accuracy = sum(greedy) / len(greedy)
        mean = sum(drawn) / len(drawn) if drawn else accuracy
        return {"accuracy": accuracy, "mean": mean, "score": (accuracy + mean) / 2}
