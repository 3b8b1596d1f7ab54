"""Generation and training on a GPU in bf16, on a small random Mistral; skipped where torch finds no GPU.

These tests were written on a machine without a GPU and have not run on one yet (docs/gpus.md).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, SFTConfig

from stages.dpo import pair_length
from stages.engine.load import engine_around
from stages.policy.adapter import adapter_weights
from stages.policy.request import Completion, Request, request_seed
from stages.run.params import load_params
from stages.sft import RowTrainer
from stages.train.pair_trainer import PairTrainer
from stages.train.trainer import Rows, trainer_arguments, training_set
from tests.policy import SMALL
from tests.policy import complete as complete_all

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
VOCABULARY, PAD, START, END = 512, 0, 1, 2
DEVICE = "cuda"
TRAINING = {"batch": 4, "learning_rate": 1e-3, "warmup_ratio": 0.0, "max_tokens": 80, "checkpoint_steps": 100}
PARAMS = load_params(SMALL)
SFT = PARAMS.sft.model_copy(update={**TRAINING, "examples": None})
DPO = PARAMS.dpo.model_copy(update=TRAINING)
HARDWARE = PARAMS.hardware.model_copy(update={"engine": "transformers", "generation_batch": 16})


@pytest.fixture
def tokenizer() -> Any:
    """A word for each token of the model."""
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>"])}
    words |= {f"w{i}": i for i in range(3, VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w3")),
        bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left",
    )  # fmt: skip


@pytest.fixture
def policy() -> Any:
    """A base in bf16 with an adapter that changes what it says."""
    torch.manual_seed(5)
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, sliding_window=None,
        initializer_range=0.1, bos_token_id=START, eos_token_id=END, pad_token_id=PAD,
    )  # fmt: skip
    base = MistralForCausalLM(config).to(DEVICE, torch.bfloat16)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    return model.eval()


def tokens(rng: random.Random, most: int = 30) -> list[int]:
    """Some tokens at random."""
    return [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(3, most))]


# ---- Generation ----------------------------------------------------------------------------------------


def requests() -> list[Request]:
    """Greedy and drawn ones, limits of their own."""
    rng = random.Random(1)
    made = []
    for number in range(24):
        prompt = (START, *tokens(rng))
        made.append(Request(f"{number}/greedy", prompt, 20 + number))
        made.append(Request(f"{number}/drawn", prompt, 40, 1.0, 0.9, request_seed(3, str(number))))
    return made


def complete(policy: Any, tokenizer: Any, done: frozenset[str] = frozenset()) -> dict[str, Completion]:
    """The completions of the requests, by id."""
    return complete_all(engine_around(policy, tokenizer, HARDWARE), requests(), done)


def test_every_request_is_completed_once_within_its_limits(policy: Any, tokenizer: Any) -> None:
    """The end is as `finish` says, and finished requests are not completed again."""
    found = complete(policy, tokenizer)
    for request in requests():
        one = found[request.id]
        assert len(one.tokens) == request.max_new_tokens or one.finish == "stop"
        assert len(one.tokens) <= request.max_new_tokens
        assert END not in one.tokens
        assert -math.inf < one.logprob < 0
    done = frozenset(list(found)[:30])
    assert complete(policy, tokenizer, done).keys() == found.keys() - done


def test_greedy_answers_are_those_of_the_cpu(policy: Any, tokenizer: Any) -> None:
    """bf16 sums in another order change some rows where two tokens are nearly as likely; most stay the same."""
    here = complete(policy, tokenizer)
    there = complete(policy.to("cpu"), tokenizer)
    greedy = [one for one in here if one.endswith("greedy")]
    same = sum(here[one].tokens == there[one].tokens for one in greedy)
    assert same / len(greedy) >= 0.6
    starts = sum(here[one].tokens[:3] == there[one].tokens[:3] for one in greedy)
    assert starts / len(greedy) >= 0.8


def test_the_adapter_is_applied(policy: Any, tokenizer: Any) -> None:
    """Without it some answers are different."""
    with_it = complete(policy, tokenizer)
    with policy.disable_adapter():
        without = complete(policy, tokenizer)
    assert any(with_it[one].tokens != without[one].tokens for one in with_it)


# ---- Training ------------------------------------------------------------------------------------------


@pytest.fixture
def trained(policy: Any, tokenizer: Any, tmp_path: Path) -> Callable[[str], tuple[Any, list[dict[str, Any]]]]:
    """A function that trains for one epoch of two steps as a stage does; it returns the trainer and its log."""
    at_once = Rows(micro_batch=2, accumulation=2, checkpointing=True)

    def train(phase: str) -> tuple[Any, list[dict[str, Any]]]:
        rng, rows = random.Random(2), []
        spec = SFT if phase == "sft" else DPO
        for _ in range(8):
            before, good, bad = [START, *tokens(rng)], [*tokens(rng), END], [*tokens(rng), END]
            if phase == "sft":
                rows.append({"input_ids": before + good, "labels": [-100] * len(before) + good})
            else:
                rows.append({"prompt_ids": before, "chosen_ids": good, "rejected_ids": bad})
        arguments = trainer_arguments(spec, 3, policy, at_once, tmp_path) | {"save_strategy": "no"}
        assert arguments["bf16"] is True and arguments["use_cpu"] is False
        lengths = [len(row["input_ids"]) if phase == "sft" else pair_length(row) for row in rows]
        data = training_set(rows, lengths, spec, 3)
        common = {"model": policy, "train_dataset": data, "processing_class": tokenizer}
        if phase == "sft":
            config = SFTConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": True})
            trainer: Any = RowTrainer(args=config, **common)
        else:
            trainer = PairTrainer(args=DPOConfig(**arguments, beta=0.1), **common)
        trainer.train()
        return trainer, [row for row in trainer.state.log_history if "loss" in row]

    return train


def test_a_step_of_sft_changes_the_adapter_alone(policy: Any, trained: Any) -> None:
    """Two steps, finite losses, every B moved, no weight of the base touched."""
    before = adapter_weights(policy)
    base = {name: w.clone() for name, w in policy.named_parameters() if "lora_" not in name}
    trainer, log = trained("sft")
    assert trainer.state.global_step == len(log) == 2
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in log)
    after = adapter_weights(policy)
    assert all(not torch.equal(after[name], w) for name, w in before.items() if "lora_B" in name)
    assert all(torch.equal(w, base[name]) for name, w in policy.named_parameters() if name in base)


def test_dpo_starts_at_its_reference_and_leaves_it(policy: Any, trained: Any) -> None:
    """The first loss is log 2, to what bf16 rounds; the reference stays the adapter it was."""
    before = adapter_weights(policy)
    _, log = trained("dpo")
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=0.01)
    reference = adapter_weights(policy, "ref")
    assert all(torch.equal(reference[name], w) for name, w in before.items())
    after = adapter_weights(policy)
    assert any(not torch.equal(after[name], w) for name, w in before.items())
