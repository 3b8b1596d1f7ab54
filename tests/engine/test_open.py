"""Opening an engine: on which device it runs, where it stops, and what the user reads when it cannot start."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from stages.engine import load, workers
from stages.engine import open as opening
from stages.engine.open import open_engine
from stages.launch import devices
from stages.policy.request import EngineStartError, end_ids
from stages.run.errors import UserError
from stages.run.params import Hardware, load_params

SMALL = Path(__file__).resolve().parents[1] / "small"


def hardware(**values: Any) -> Hardware:
    return load_params(SMALL).hardware.model_copy(update=values)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("simulated"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when")],
)
def test_an_engine_that_does_not_start_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    """One process reports it to the user. A worker raises EngineStartError, so that the others can go on."""
    monkeypatch.delenv("LOOPER_LAUNCHER", raising=False)
    wanted = "the model does not fit into memory; `python -m stages check` says how much it needs"

    def start(_: Any) -> Any:
        raise error

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


@pytest.mark.parametrize(
    ("engine", "gpus", "said"), [("auto", 1, True), ("transformers", 1, False), ("auto", 0, False)]
)
def test_a_gpu_without_vllm_is_named_with_its_price(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], engine: str, gpus: int, said: bool
) -> None:
    """Once, and not where the profile chose transformers or there is no GPU."""
    monkeypatch.delenv("LOOPER_LAUNCHER", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(opening, "load_engine", lambda *_: "engine")
    with open_engine(None, hardware(engine=engine, processes=1)) as made:
        assert made == "engine"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == said
    for line in lines:
        assert re.search(
            "vLLM is not installed.* four times as long.* pip install -r requirements-gpu.txt$", line
        )


class FakeProcess:
    """Keeps how it was started; the second one cannot start."""

    made: ClassVar[list[FakeProcess]] = []

    def __init__(self, **given: Any) -> None:
        self.given, self.ended = given, False
        self.made.append(self)

    def start(self) -> None:
        if len(self.made) == 2:
            raise OSError("no more processes")

    def kill(self) -> None:
        self.ended = True

    def join(self) -> None:
        assert self.ended


def test_workers_may_have_children_and_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM may start processes, which a daemon may not. Python would wait at its end for any that is not one."""
    context = SimpleNamespace(
        Pipe=lambda: (SimpleNamespace(), SimpleNamespace(close=lambda: None)), Process=FakeProcess
    )
    monkeypatch.setattr(workers, "get_context", lambda _: context)
    monkeypatch.setattr(FakeProcess, "made", [])
    with pytest.raises(OSError, match="no more"), workers.WorkersEngine(None, hardware(), 2):
        pass
    assert [process.given["daemon"] for process in FakeProcess.made] == [False, False]
    assert FakeProcess.made[0].ended


def test_the_model_in_training_generates_without_what_training_wraps_round_it(model: Any) -> None:
    """accelerate wraps the forward pass of the PEFT model for good. The engine calls the base model inside."""
    tokenizer = SimpleNamespace(eos_token_id=2, pad_token_id=0)
    engine = load.engine_around(model, tokenizer, hardware())
    assert engine.model is model.get_base_model()
    assert load.engine_around(engine.model, tokenizer, hardware()).model is engine.model
    assert engine.model.peft_config == model.peft_config, "the memory estimate asks for the rank"
