"""The engine a stage generates with: which kind, in how many processes, on how many hosts."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from stages.core.devices import host_processes, launcher
from stages.core.errors import UserError
from stages.core.params import Hardware
from stages.engine.base import Engine, EngineStartError, end_ids

NO_VLLM = "vllm is not installed; `pip install -r requirements-gpu.txt`, or say auto"


@contextlib.contextmanager
def open_engine(adapter: Path | None, hardware: Hardware) -> Iterator[Engine]:
    """An engine for the base model with `adapter` (or none), on every device there is; closed in the end.

    With one device it runs in this process, with several in a process for each, under the ray launcher on the
    hosts of the cluster. Raises UserError when the profile asks for an engine that this machine has not, or when it
    cannot start.
    """
    if launcher() == "ray":
        from stages.engine.ray_engine import RayEngine

        with RayEngine(adapter, hardware) as ray_engine:
            yield ray_engine
    elif (count := host_processes(hardware)) > 1:
        from stages.engine.workers import WorkersEngine

        with WorkersEngine(adapter, hardware, count) as workers:
            yield workers
    else:
        try:
            engine = load_engine(adapter, hardware)
        except EngineStartError as error:
            raise UserError(f"generation: {error}") from error
        yield engine


def load_engine(adapter: Path | None, hardware: Hardware) -> Engine:
    """An engine in this process, on its own device, with its own copy of the model; or EngineStartError."""
    import torch

    kind = engine_kind(hardware)
    if kind == "vllm":
        from stages.engine.vllm_engine import VllmEngine

        return VllmEngine(adapter)
    from stages.core.policy import load_policy

    try:
        model, tokenizer = load_policy(adapter)
    except torch.OutOfMemoryError:
        raise EngineStartError(
            "the model does not fit into memory; `python -m stages check` says more"
        ) from None
    return make_engine(model, tokenizer, hardware)


def make_engine(model: Any, tokenizer: Any, hardware: Hardware) -> Engine:
    """An engine around a model in memory; it stops at every end token the model declares."""
    ends = end_ids(tokenizer, model.generation_config)
    kind = engine_kind(hardware, half=model.dtype.itemsize == 2, loaded=True)
    if kind == "transformers" or model.training:
        from stages.core.memory import generation_batch
        from stages.engine.transformers_engine import TransformersEngine

        rows = partial(generation_batch, model, hardware)
        return TransformersEngine(model, ends, tokenizer.pad_token_id, rows)
    from stages.engine.continuous_engine import ContinuousEngine

    return ContinuousEngine(model, ends, tokenizer.pad_token_id)


def engine_kind(hardware: Hardware, half: bool = True, loaded: bool = False) -> str:
    """`transformers`, `continuous` or `vllm`: what the profile asks for, or the best one there is.

    Without flash attention, continuous batching has every row look at the keys of all rows and mask the others', so
    its attention costs the square of the rows: then plain batches are taken. So they are when the model is not in
    `half` precision, the only one flash attention computes in. vLLM loads the model by itself: where one is `loaded`
    already, the better of the other two takes its place.
    """
    import torch

    have_vllm = "vllm" in engine_kinds()
    if hardware.engine == "vllm" and not have_vllm:
        raise UserError(f"hardware.engine: {NO_VLLM}")
    if hardware.engine not in ("auto", "vllm") or (hardware.engine == "vllm" and not loaded):
        return hardware.engine
    if not torch.cuda.is_available():
        return "transformers"
    if have_vllm and not loaded:
        return "vllm"
    return "continuous" if half and _can_flash() else "transformers"


def engine_kinds() -> list[str]:
    """Every kind that is installed."""
    return ["transformers", "continuous", *(["vllm"] if importlib.util.find_spec("vllm") else [])]


def _can_flash() -> bool:
    """Whether one of the kernels that continuous batching asks transformers for is there and loads."""
    from transformers import utils

    return any(
        found(kernels_fallback_ok=True)
        for found in (utils.is_flash_attn_3_available, utils.is_flash_attn_2_available)
    )
