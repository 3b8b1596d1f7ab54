"""Where a policy is loaded: each of several processes on its own GPU, and nothing of it on another one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stages.policy import adapter


class OnGpu:
    """A model that says it is on the GPU it was sent to."""

    def __init__(self, calls: list[tuple[str, Any]]) -> None:
        self.calls, self.device = calls, torch.device("cpu")

    def to(self, device: str) -> OnGpu:
        self.calls.append(("model", device))
        self.device = torch.device(device)
        return self

    def train(self, mode: bool) -> OnGpu:
        return self


@pytest.mark.parametrize(("rank", "device"), [("3", "cuda:3"), (None, "cuda:0")])
def test_a_process_loads_everything_onto_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, device: str
) -> None:
    """The device is set before anything is loaded, and PEFT is told where the adapter goes."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    calls: list[tuple[str, Any]] = []

    def load(model: OnGpu, folder: str, torch_device: str | None = None, **_: Any) -> OnGpu:
        calls.append(("adapter", torch_device))
        return model

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("process", device)))
    monkeypatch.setattr(
        adapter, "AutoModelForCausalLM", SimpleNamespace(from_pretrained=lambda *_, **__: OnGpu(calls))
    )
    monkeypatch.setattr(adapter, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(adapter, "PeftModel", SimpleNamespace(from_pretrained=load))
    adapter.load_policy(adapter.BASE, trainable=True)
    assert calls == [("process", device), ("model", device), ("adapter", device)]
