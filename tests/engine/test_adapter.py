"""Where a policy is loaded, each of several processes on its own GPU alone, and in which precision."""

from __future__ import annotations

from pathlib import Path
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


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bf16", [True, False])
def test_a_processor_without_bf16_computes_in_32_bits(
    model: Any,
    policy_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    stored: torch.dtype,
    bf16: bool,
) -> None:
    """The numbers of the weights are the same; what was stored in 32 bits is never rounded."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(adapter, "computes_bf16", lambda: bf16)
    monkeypatch.setattr(adapter, "load_tokenizer", lambda _: None)
    base, _ = adapter.load_base(policy_folder / "base")
    base.to(stored).save_pretrained(tmp_path)
    loaded, _ = adapter.load_base(tmp_path)
    assert {one.dtype for one in loaded.parameters()} == {stored if bf16 else torch.float32}
    pairs = zip(loaded.parameters(), base.parameters(), strict=True)
    assert all(torch.equal(one.float(), other.float()) for one, other in pairs)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_an_adapter_is_in_32_bits_only_to_be_trained(
    model: Any, policy_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stored: torch.dtype
) -> None:
    """To generate, its weights are rounded to the model's precision."""
    monkeypatch.setattr(adapter, "computes_bf16", lambda: True)
    monkeypatch.setattr(adapter, "load_tokenizer", lambda _: None)
    base, _ = adapter.load_base(policy_folder / "base")
    base.to(stored).save_pretrained(tmp_path)
    saved = adapter.read_adapter(policy_folder / "adapter")
    for trainable, dtype in [(True, torch.float32), (False, stored)]:
        loaded, _ = adapter.load_policy(policy_folder / "adapter", tmp_path, trainable=trainable)
        weights = adapter.adapter_weights(loaded)
        assert weights.keys() == saved.keys()
        assert all(torch.equal(one, saved[name].to(dtype)) for name, one in weights.items())
        assert {one.dtype for one in weights.values()} == {dtype}
