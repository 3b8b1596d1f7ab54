"""TRL's DPO trainer on pairs that are already tokens, and the proof that it starts as it should."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import set_peft_model_state_dict
from trl import DPOTrainer
from trl.trainer.utils import use_adapter

from stages.policy.adapter import adapter_weights, read_adapter
from stages.run.params import Dpo
from stages.train.trainer import BalancedTokens, InputsAsTheyAre


class PairTrainer(BalancedTokens, InputsAsTheyAre, DPOTrainer):
    """TRL's trainer on pairs that are already tokens: training divides prompt and completion as generation does.

    `nll` weighs the negative log-likelihood of the chosen completions beside TRL's losses: for each completion the mean
    over its tokens, as in Pang et al. 2024 (arXiv 2404.19733), equation 2. TRL's own `sft` loss is the mean over all
    tokens of a micro-batch, so it depends on how a batch is cut into micro-batches.

    Micro-batches have different numbers of pairs (BalancedTokens), and each counts by that number, so that the loss is
    the mean over the pairs of the global batch. The figures that TRL logs beside it are means over micro-batches.
    """

    def __init__(self, *args: Any, nll: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.nll = nll
        gather = self.accelerator.gather

        def gather_rows(values: torch.Tensor) -> torch.Tensor:
            """As `Accelerator.gather`, which needs equally many rows in all processes."""
            if not values.dim():
                return gather(values)
            everyone = gather(self.accelerator.pad_across_processes(values, pad_index=math.nan))
            return everyone[~everyone.isnan()]

        self.accelerator.gather = gather_rows

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """The micro-batch's share of the loss of its optimizer step; see `transformers.Trainer`."""
        pairs = len(inputs["input_ids"]) // 2  # the batch is [chosen, rejected]
        return super().compute_loss(model, inputs, *args, **kwargs) * (pairs / self.args.train_batch_size)

    def _compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool
    ) -> torch.Tensor:
        seen = []

        def watched(**kwargs: Any) -> Any:
            seen.append(model(**kwargs))
            return seen[-1]

        loss = super()._compute_loss(watched, inputs, return_outputs)
        if not self.nll:
            return loss
        mask = inputs["completion_mask"][:, 1:].chunk(2)[0]
        logprobs = seen[0].log_probs[:, -mask.shape[1] :].chunk(2)[0]
        return loss - self.nll * ((logprobs * mask).sum(1) / mask.sum(1)).mean()

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


def split_losses(spec: Dpo) -> tuple[dict[str, Any], float]:
    """TRL's share of the losses, as arguments of DPOConfig, and the weight of the NLL term (`sft`), which is ours.

    TRL needs a loss of its own; beside the NLL term alone it is one that weighs nothing.
    """
    weights = dict(zip(spec.loss_type, spec.loss_weights, strict=True))
    nll = weights.pop("sft", 0.0)
    weights = weights or {"sigmoid": 0.0}
    return {"loss_type": list(weights), "loss_weights": list(weights.values())}, nll


def set_reference(model: Any, adapter: Path) -> None:
    """Give the frozen reference the weights of a saved adapter. TRL made it as a copy of the policy."""
    set_peft_model_state_dict(model, read_adapter(adapter), adapter_name="ref")
    assert_reference(model, adapter)


def assert_reference(model: Any, adapter: Path) -> None:
    """Raise RuntimeError unless the frozen reference equals a saved adapter, tensor by tensor."""
    reference = adapter_weights(model, "ref")
    for name, wanted in read_adapter(adapter).items():
        if not torch.equal(reference[name], wanted):
            raise RuntimeError(f"the DPO reference is not {adapter}: {name} differs")


def assert_same_start(trainer: Any, rows: list[dict[str, list[int]]]) -> None:
    """Raise RuntimeError unless policy and reference give the first pair the same log-probabilities.

    One pair, and through the output layer that training uses, which never holds all logits: so this needs less memory
    than the first training step, and the estimate (stages/launch/memory.py) covers it.
    """
    batch = trainer._prepare_inputs(trainer.data_collator(rows[:1]))
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)

    def logprobs() -> torch.Tensor:
        with torch.no_grad():
            output = trainer.model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                labels=labels,
                use_cache=False,
                fused_lm_head=True,
            )
        return output.log_probs.sum(1)

    trainer.model.eval()
    policy = logprobs()
    with use_adapter(trainer.model, adapter_name="ref"):
        reference = logprobs()
    trainer.model.train()
    if not torch.allclose(policy, reference, atol=1e-5):
        raise RuntimeError(f"DPO must start at its reference; log-probabilities are {policy} and {reference}")
