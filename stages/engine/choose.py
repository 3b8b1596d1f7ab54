"""The engine a stage generates with."""

from __future__ import annotations

from typing import Any

from stages.core.params import Hardware
from stages.engine.base import Engine
from stages.engine.transformers_engine import TransformersEngine


def make_engine(model: Any, tokenizer: Any, hardware: Hardware) -> Engine:
    """The best engine there is for `model` on this machine; it stops at every end token the model declares."""
    ends = model.generation_config.eos_token_id
    end_ids = [
        tokenizer.eos_token_id,
        *(ends if isinstance(ends, list) else [ends] if ends is not None else []),
    ]
    return TransformersEngine(model, end_ids, tokenizer.pad_token_id, hardware.generation_batch)
