"""Bytes that a block of the real run's model moves outside of its matrix products, in a step of bf16 LoRA training.

    python bench/traffic.py

A GPU computes a product and waits for memory in everything else: casts, norms, dropout, sums, activations. Those bytes
are counted here, not measured: each operation of a forward and a backward pass through one block of Abel-7B's shape is
noted with the sizes of what it reads and writes (matrix products and attention excepted), on tensors without content,
so nothing is computed. The columns: with PEFT's copies of the adapter's inputs in 32 bits, as TRL's trainers have it,
and without, as the stages do it (core/training.py, InputsAsTheyAre). Counted are the operations of a CPU, where dropout
is several, on a GPU one: so the row without it (DPO has none) is the surer one.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import torch
from common import print_table
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, MistralConfig

PRODUCTS = ("mm", "addmm", "bmm", "_scaled_dot_product")
NOTHING_MOVES = ("device", "_unsafe_view", "empty", "empty_like")  # questions, and memory as it is
SHAPE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 64, "sliding_window": None,
}  # fmt: skip


class Bytes(TorchDispatchMode):
    """What the operations inside the block read and write, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        if not func.is_view and not name.startswith(PRODUCTS) and name not in NOTHING_MOVES:
            tensors = [one for one in tree_leaves((args, kwargs, out)) if isinstance(one, torch.Tensor)]
            self.by_name[name] += sum(one.numel() * one.element_size() for one in tensors)
        return out


def block_bytes(rows: int, tokens: int, rank: int, dropout: float, casts: bool) -> float:
    """Bytes for each token: of a model with two blocks less those of a model with one."""
    found = []
    for layers in (1, 2):
        config = MistralConfig(**SHAPE, num_hidden_layers=layers)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        lora = LoraConfig(r=rank, lora_dropout=dropout, target_modules="all-linear")
        policy = get_peft_model(empty.to_empty(device="cpu"), lora).train()
        body = policy.base_model.model.model
        without_content = FakeTensorMode(allow_non_fake_inputs=True)
        weights = {name: without_content.from_tensor(one) for name, one in body.named_parameters()}
        counted = Bytes()
        with (
            disable_input_dtype_casting(policy, active=not casts),
            without_content,
            counted,
            torch.autocast("cpu", torch.bfloat16),
        ):
            embedded = torch.zeros((rows, tokens, config.hidden_size), dtype=torch.bfloat16)
            given = {"inputs_embeds": embedded.requires_grad_(), "use_cache": False}
            torch.func.functional_call(body, weights, kwargs=given)[0].sum().backward()
        found.append(sum(counted.by_name.values()))
    return (found[1] - found[0]) / (rows * tokens)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=8, help="taken at once")
    parser.add_argument("--tokens", type=int, default=270, help="a row")
    parser.add_argument("--rank", type=int, default=32)
    options = parser.parse_args()
    table = []
    for label, dropout in (("SFT, dropout 0.05", 0.05), ("DPO, no dropout", 0.0)):
        counts = [
            block_bytes(options.rows, options.tokens, options.rank, dropout, casts) / 1e6
            for casts in (True, False)
        ]
        table.append([label, *(f"{count:.2f} MB" for count in counts), f"{counts[1] / counts[0]:.2f} ×"])
    print(f"torch {torch.__version__}; {options.rows} rows of {options.tokens} tokens, rank {options.rank}\n")
    print_table(["a token and block", "as TRL's trainers have it", "ours", "ours is"], table)


if __name__ == "__main__":
    main()
