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
from stages.train.trainer import BalancedTokens, InputsAsTheyAre


class PairTrainer(BalancedTokens, InputsAsTheyAre, DPOTrainer):
    """TRL's trainer on pairs that are already tokens: training divides prompt and completion as generation does.

    The loss `sft` is the negative log-likelihood of the chosen completions: for each one the mean over its tokens, as
    in Pang et al. 2024 (arXiv 2404.19733), equation 2. TRL's own `sft` is the mean over all tokens of a micro-batch, so
    it depends on how a batch is cut into micro-batches. Alone it computes no rejected completion and no reference.

    Micro-batches have different numbers of pairs (BalancedTokens), and each counts by that number, so that the loss is
    the mean over the pairs of the global batch. The figures that TRL logs beside it are means over micro-batches.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        losses = dict(zip(self.args.loss_type, self.args.loss_weights, strict=True))
        self.nll: float = losses.pop("sft", 0.0)
        self.loss_types: list[str] = list(losses)  # what TRL computes
        self.loss_weights: list[float] = list(losses.values())
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
        if not self.loss_types:
            return self.nll * self._chosen_nll(model, inputs)
        seen = []

        def watched(**kwargs: Any) -> Any:
            seen.append(model(**kwargs))
            return seen[-1]

        loss = super()._compute_loss(watched, inputs, return_outputs)
        if not self.nll:
            return loss
        mask = inputs["completion_mask"][:, 1:].chunk(2)[0]
        logprobs = seen[0].log_probs[:, -mask.shape[1] :].chunk(2)[0]
        return loss + self.nll * mean_nll(logprobs, mask)

    def _chosen_nll(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The mean NLL of the chosen completions, from a forward pass of these alone."""
        longest = int(inputs["attention_mask"].chunk(2)[0].sum(1).max())
        chosen = {name: rows.chunk(2)[0][:, :longest] for name, rows in inputs.items()}
        mask = chosen.pop("completion_mask")
        labels = chosen["input_ids"].masked_fill(mask == 0, -100)
        logprobs = model(**chosen, labels=labels, use_cache=False, fused_lm_head=True).log_probs
        logprobs = logprobs[:, -(longest - 1) :]
        sums = self.accelerator.gather(logprobs.detach().sum(1))
        self._metrics["train"]["logps/chosen"].append(sums.mean().item())
        return mean_nll(logprobs, mask[:, 1:])

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


def mean_nll(logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean over rows of each row's own mean of -`logprobs` where `mask` is 1; both are rows × tokens."""
    return -((logprobs * mask).sum(1) / mask.sum(1)).mean()


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
