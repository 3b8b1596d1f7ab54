"""A small random policy, in memory and as folders, and requests for it. The tests of engines use them."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import MistralConfig, MistralForCausalLM

from stages.policy.adapter import adapter_config, adapter_weights, save_adapter
from stages.policy.request import Completion, Engine, Request, request_seed
from stages.run.params import BuiltModel, load_params
from stages.tiny.model import build_tokenizer

SMALL = Path(__file__).resolve().parent / "small"
VOCABULARY, PAD, END = 64, 0, [2, 5, 9, 33]
NEEDS_VLLM = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; make test-vllm"
)


def make_policy(folder: Path) -> Any:
    """A base and an adapter with random weights, saved in `base` and `adapter` of the folder as the stages do.

    The weights are large enough that the next token is far from evenly spread.
    """
    torch.manual_seed(5)
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,  # heads of 32, the least that vLLM takes
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        sliding_window=None,
        initializer_range=0.125,
        bos_token_id=1,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    base = MistralForCausalLM(config)
    base.save_pretrained(folder / "base")
    spec = load_params(SMALL).model
    assert isinstance(spec, BuiltModel)
    build_tokenizer(spec, [("Ann has 3 apples.", "3")]).save_pretrained(folder / "base")
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = get_peft_model(base, lora)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    (folder / "adapter").mkdir()
    save_adapter(adapter_weights(policy), adapter_config(policy), folder / "adapter")
    return policy.eval()


def prompts(count: int, seed: int = 1) -> list[tuple[int, ...]]:
    """Random prompts of 3 to 14 tokens."""
    rng = random.Random(seed)
    return [tuple(rng.randrange(10, VOCABULARY) for _ in range(rng.randint(3, 14))) for _ in range(count)]


def mixed_requests() -> list[Request]:
    """Greedy and drawn ones, three to a prompt, with different limits."""
    requests = []
    for number, prompt in enumerate(prompts(20)):
        requests.append(Request(f"{number}/greedy", prompt, 12 + number))
        for k, (temperature, top_p) in enumerate([(0.8, 1.0), (1.3, 0.9)]):
            seed = request_seed(3, str(number), str(k))
            requests.append(Request(f"{number}/{k}", prompt, 30, temperature, top_p, seed))
    return requests


def complete(
    engine: Engine, requests: list[Request], done: frozenset[str] = frozenset()
) -> dict[str, Completion]:
    completions = list(engine.generate(requests, done))
    assert len({one.id for one in completions}) == len(completions)
    return {one.id: one for one in completions}
