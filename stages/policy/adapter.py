"""Loads and saves a policy: the base model, and on top of it an adapter that is never merged into the weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.run.errors import UserError
from stages.run.paths import BASE
from stages.run.process import computes_bf16

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


def load_base(folder: Path = BASE) -> tuple[Any, Any]:
    """The model and tokenizer of a checkpoint folder, on the GPU if there is one, in the precision it was saved in.

    A processor without bf16 instructions takes bf16 weights in 32 bits, which hold the same numbers.
    """
    device, dtype = "cpu", "auto" if computes_bf16() else torch.float32
    if torch.cuda.is_available():
        device, dtype = f"cuda:{os.environ.get('LOCAL_RANK', '0')}", "auto"
        # First of all: else what asks for no device in particular lands on GPU 0.
        torch.cuda.set_device(device)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.to(device), load_tokenizer(folder)


def load_tokenizer(folder: Path = BASE) -> Any:
    """The tokenizer of a checkpoint folder. Raises UserError when it has no pad token of its own."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(
            f"{folder}: the tokenizer's pad token must exist and differ from its end token; rerun base"
        )
    return tokenizer


def load_policy(adapter: Path | None, base: Path = BASE, trainable: bool = False) -> tuple[Any, Any]:
    """The base model with `adapter` applied unmerged (or none), and its tokenizer.

    To be trained, the adapter is in 32 bits; else in the base's precision, as in vLLM, where no layer has to convert
    its input and output.
    """
    model, tokenizer = load_base(base)
    if adapter is not None:
        # Told no device, PEFT reads the weights onto GPU 0 (infer_device), in every process.
        device = str(model.device)
        model = PeftModel.from_pretrained(
            model,
            str(adapter),
            is_trainable=trainable,
            autocast_adapter_dtype=trainable,
            torch_device=device,
        )
    return model.train(trainable), tokenizer


def adapter_weights(model: Any, name: str = "default") -> dict[str, torch.Tensor]:
    """The tensors of one adapter on the CPU, under the names PEFT saves them by."""
    state = get_peft_model_state_dict(model, adapter_name=name)
    return {key: value.detach().cpu().contiguous().clone() for key, value in sorted(state.items())}


def save_adapter(weights: Mapping[str, torch.Tensor], config: dict[str, Any], folder: Path) -> None:
    """Write the two files that PEFT reads: weights and config."""
    save_file(dict(weights), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (folder / ADAPTER_CONFIG).write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def adapter_config(model: Any, name: str = "default") -> dict[str, Any]:
    """The adapter's config as plain data that is the same on every machine: lists sorted, no local path."""
    config = model.peft_config[name].to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    plain |= {"base_model_name_or_path": BASE.as_posix(), "inference_mode": True}
    return json.loads(json.dumps(plain, default=lambda value: getattr(value, "value", str(value))))


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a saved adapter."""
    return load_file(folder / ADAPTER_WEIGHTS)
