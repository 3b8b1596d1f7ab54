"""Which engine a machine gets, and what it is told."""

from __future__ import annotations

import importlib.machinery
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from stages.core import policy
from stages.core.errors import UserError
from stages.core.params import Hardware, load_params
from stages.engine import choose, vllm_engine, workers
from stages.engine.base import EngineStartError, end_ids

SMALL = Path(__file__).resolve().parents[1] / "small"


def hardware(**values: Any) -> Hardware:
    return load_params(SMALL).hardware.model_copy(update=values)


@pytest.mark.parametrize(
    ("gpu", "vllm", "flash", "half", "kind"),
    [
        (False, False, None, True, "transformers"),
        (False, True, 2, True, "transformers"),
        (True, False, None, True, "transformers"),
        (True, False, 2, True, "continuous"),
        (True, False, 3, True, "continuous"),
        (True, False, 3, False, "transformers"),
        (True, True, None, True, "vllm"),
        (True, True, 3, False, "vllm"),
    ],
)
def test_auto_takes_the_best_there_is(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, vllm: bool, flash: int | None, half: bool, kind: str
) -> None:
    specs = {"vllm": importlib.machinery.ModuleSpec("vllm", None)} if vllm else {}
    monkeypatch.setattr(choose.importlib.util, "find_spec", specs.get)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    for version in (2, 3):
        found = flash == version
        name = f"is_flash_attn_{version}_available"
        monkeypatch.setattr(transformers.utils, name, lambda kernels_fallback_ok, found=found: found)
    assert choose.engine_kind(hardware(engine="auto"), half) == kind


@pytest.mark.parametrize("engine", ["auto", "vllm"])
@pytest.mark.parametrize(
    ("dtype", "flash", "made"),
    [
        (torch.float32, True, "TransformersEngine"),
        (torch.bfloat16, True, "ContinuousEngine"),
        (torch.bfloat16, False, "TransformersEngine"),
    ],
)
def test_a_model_in_memory_gets_what_is_best_for_it(
    monkeypatch: pytest.MonkeyPatch, engine: str, dtype: torch.dtype, flash: bool, made: str
) -> None:
    """vLLM would load it once more; flash attention computes in half precision only."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(choose, "_can_flash", lambda: flash)
    monkeypatch.setattr(choose, "engine_kinds", lambda: ["transformers", "continuous", "vllm"])
    ends = SimpleNamespace(eos_token_id=2)
    model = SimpleNamespace(dtype=dtype, training=False, generation_config=ends, device=torch.device("cpu"))
    tokenizer = SimpleNamespace(eos_token_id=2, pad_token_id=0)
    assert type(choose.make_engine(model, tokenizer, hardware(engine=engine))).__name__ == made


def test_an_engine_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"vllm is not installed; `pip install -r requirements-gpu\.txt`"):
        choose.engine_kind(hardware(engine="vllm"))


@pytest.mark.parametrize("failure", ["memory", "vllm"])
def test_an_engine_that_does_not_start_is_said(monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    """In one line to the user; to others as an error of the process, which several can do without."""
    monkeypatch.delenv("LOOPER_LAUNCHER", raising=False)
    if failure == "memory":
        wanted = "the model does not fit into memory; `python -m stages check` says more"

        def load(_: Any) -> Any:
            raise torch.OutOfMemoryError("simulated")

        monkeypatch.setattr(policy, "load_policy", load)
    else:
        wanted = "vLLM did not start (no free memory); see to that"

        def start(_: Any) -> Any:
            raise EngineStartError("vLLM did not start (no free memory); see to that")

        monkeypatch.setattr(choose, "engine_kind", lambda _: "vllm")
        monkeypatch.setattr(vllm_engine, "VllmEngine", start)
    with pytest.raises(EngineStartError, match=re.escape(wanted)):
        choose.load_engine(None, hardware(engine="transformers", processes=1))
    with (
        pytest.raises(UserError, match=re.escape(f"generation: {wanted}")),
        choose.open_engine(None, hardware(engine="transformers", processes=1)),
    ):
        pass


@pytest.mark.parametrize(
    ("tokenizers", "declared", "ends"),
    [(2, None, [2]), (2, 5, [2, 5]), (2, [9, 2], [2, 9]), (None, [7], [7]), (None, None, [])],
)
def test_every_end_token_counts(tokenizers: int | None, declared: Any, ends: list[int]) -> None:
    tokenizer, config = SimpleNamespace(eos_token_id=tokenizers), SimpleNamespace(eos_token_id=declared)
    assert end_ids(tokenizer, config) == ends


@pytest.mark.parametrize(
    ("visible", "rank", "seen"), [(None, 1, "1"), ("4,6", 1, "6"), ("GPU-a,GPU-b", 0, "GPU-a"), ("", 1, "")]
)
def test_a_process_sees_its_own_gpu_only(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, rank: int, seen: str
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "unset")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    workers._own_device(rank)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen
    assert os.environ["LOCAL_RANK"] == "0"
    os.environ.pop("CUDA_VISIBLE_DEVICES")


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with (
        pytest.raises(UserError, match=r"hardware\.processes: 3, but there are 2 GPUs; say auto"),
        workers.WorkersEngine(None, hardware(), 3),
    ):
        pass
