"""Opening an engine: on which device it runs, where it stops, and what the user reads when it cannot start."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stages.engine import load, workers
from stages.engine.open import open_engine
from stages.policy.request import EngineStartError, end_ids
from stages.run.errors import UserError
from stages.run.params import Hardware, load_params

SMALL = Path(__file__).resolve().parents[1] / "small"


def hardware(**values: Any) -> Hardware:
    return load_params(SMALL).hardware.model_copy(update=values)


def test_an_engine_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process reports it to the user. A worker raises EngineStartError, so that the others can go on."""
    monkeypatch.delenv("LOOPER_LAUNCHER", raising=False)
    wanted = "the model does not fit into memory; `python -m stages check` says how much it needs"

    def start(_: Any) -> Any:
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(load, "load_policy", start)
    small = hardware(engine="transformers", processes=1)
    with pytest.raises(EngineStartError, match=re.escape(wanted)):
        load.load_engine(None, small)
    with pytest.raises(UserError, match=re.escape(f"generation: {wanted}")), open_engine(None, small):
        pass


@pytest.mark.parametrize(
    ("tokenizers", "declared", "ends"),
    [(2, None, [2]), (2, 5, [2, 5]), (2, [9, 2], [2, 9]), (None, [7], [7]), (None, None, [])],
)
def test_the_end_tokens_are_those_of_the_tokenizer_and_of_the_model(
    tokenizers: int | None, declared: Any, ends: list[int]
) -> None:
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
