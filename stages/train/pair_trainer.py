"""TRL's DPO trainer on pairs that are already tokens, and the proof that it starts at the SFT adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import DPOTrainer
from trl.trainer.utils import use_adapter

from stages.policy.adapter import adapter_weights, read_adapter
from stages.train.trainer import InputsAsTheyAre


class PairTrainer(InputsAsTheyAre, DPOTrainer):
    """TRL's trainer on pairs that are already tokens: training divides prompt and completion as generation does."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


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
