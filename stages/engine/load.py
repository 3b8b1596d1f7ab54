"""Loads an engine into this process: vLLM on a GPU where it is installed, transformers everywhere else."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel

from stages.engine.transformers_engine import TransformersEngine
from stages.engine.vllm_engine import VllmEngine
from stages.launch.devices import engine_kind
from stages.launch.memory import generation_batch
from stages.policy.adapter import load_policy
from stages.policy.request import Engine, EngineStartError, end_ids
from stages.run.params import Hardware
from stages.run.shortage import ran_out_of_memory


def load_engine(adapter: Path | None, hardware: Hardware) -> Engine:
    """An engine on this process's device, with its own copy of the base model and `adapter` (or none).

    Raises EngineStartError when the model does not fit or vLLM does not start, UserError when vLLM is not installed.
    """
    if engine_kind(hardware) == "vllm":
        return VllmEngine(adapter)
    try:
        model, tokenizer = load_policy(adapter)
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        raise EngineStartError(
            "the model does not fit into memory; `python -m stages check` says how much it needs"
        ) from None
    return engine_around(model, tokenizer, hardware)


def engine_around(model: Any, tokenizer: Any, hardware: Hardware) -> TransformersEngine:
    """An engine around a model that is already in memory; it stops at every end token the model declares.

    It calls the base model, which has the adapter's layers in it. Around the forward pass of the PEFT model that it
    trains, accelerate wraps autocast for good (Accelerator.prepare_model), so that step 0 of a training, which
    comes before, would be scored in another arithmetic than the later steps.
    """
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    ends = end_ids(tokenizer, model.generation_config)
    return TransformersEngine(model, ends, tokenizer.pad_token_id, partial(generation_batch, model, hardware))
