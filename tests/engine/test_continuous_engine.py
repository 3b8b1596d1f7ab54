"""Continuous batching: what it promises beyond the contract (test_engine_contract.py), on the same small model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import MistralConfig, MistralForCausalLM

from stages.engine.base import Completion, Request, request_seed
from stages.engine.continuous_engine import ContinuousEngine
from stages.engine.transformers_engine import TransformersEngine


def small_model(window: int | None = None) -> Any:
    torch.manual_seed(5)
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, sliding_window=window, initializer_range=0.25,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def requests(count: int = 12, limit: int = 10) -> list[Request]:
    """Every other one greedy; half of the drawn ones from the whole vocabulary."""
    return [
        Request(
            str(i), (10 + i, 20, 30 + i % 3), limit,
            temperature=[0.0, 1.2][i % 2], top_p=[1.0, 0.9][i % 4 // 2], seed=request_seed(1, str(i)),
        )
        for i in range(count)
    ]  # fmt: skip


def tokens(completions: Iterator[Completion]) -> dict[str, tuple[int, ...]]:
    return {one.id: one.tokens for one in completions}


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """A stage ends with its main thread; one of the library's would keep the process alive."""
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def test_an_adapter_is_applied_and_not_merged() -> None:
    model = small_model()
    plain = tokens(ContinuousEngine(model, [2], 0).generate(requests()))
    base = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_B" in name:
                value.normal_()
    adapted.eval()
    found = tokens(ContinuousEngine(adapted, [2], 0).generate(requests()))
    assert found == tokens(TransformersEngine(adapted, [2], 0, 8).generate(requests()))
    assert found != plain
    for name, value in base.items():  # PEFT puts the wrapped layer's weights under base_layer
        name = (
            name.replace("_proj.weight", "_proj.base_layer.weight")
            if "q_proj" in name or "v_proj" in name
            else name
        )
        assert torch.equal(adapted.get_base_model().state_dict()[name], value)


@pytest.mark.parametrize("window", [64, 8])
def test_a_sliding_window_is_lifted_while_no_request_reaches_it(window: int) -> None:
    """With 13 tokens at most, a window of 64 changes nothing; one of 8 does, and is kept."""
    model = small_model(window)
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(model.config.sliding_window))
    found = tokens(ContinuousEngine(model, [], 0).generate(requests()))
    assert set(seen) == ({None} if window == 64 else {8})
    assert model.config.sliding_window == window
    assert found == tokens(TransformersEngine(model, [], 0, 8).generate(requests()))


def test_the_attention_is_named_and_the_models_own_is_put_back() -> None:
    model = small_model()
    before = model.config._attn_implementation
    engine = ContinuousEngine(model, [2], 0)
    list(engine.generate(requests()))
    assert engine.kernel is not None and "sdpa" in engine.kernel
    assert model.config._attn_implementation == before


def test_fewer_rows_when_memory_runs_out() -> None:
    """A step of more than 5 tokens does not fit: the rows are halved until it does; nothing is lost or done twice."""
    model = small_model()
    wanted = tokens(ContinuousEngine(model, [], 0).generate(requests()))

    def full(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape[1] > 5 and torch.all(
            kwargs["position_ids"] > 2
        ):  # none is reading its prompt
            raise torch.OutOfMemoryError("no room for so many rows")

    model.register_forward_pre_hook(full, with_kwargs=True)
    engine = ContinuousEngine(model, [], 0)
    engine.rows = 16
    completions = list(engine.generate(requests()))
    assert len(completions) == len(wanted)
    assert {one.id: one.tokens for one in completions} == wanted
    assert engine.rows == 4


def test_no_room_for_a_single_row_is_raised() -> None:
    model = small_model()

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    model.register_forward_pre_hook(full)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        list(ContinuousEngine(model, [], 0).generate(requests()))


def test_a_failure_in_the_librarys_thread_is_raised() -> None:
    """The library logs it and gives back what it has; here what is missing is counted."""
    model = small_model()
    steps = []

    def broken(*_: Any) -> None:
        steps.append(1)
        if len(steps) == 4:
            raise RuntimeError("the device is gone")

    model.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="left 12 requests undone: the device is gone"):
        list(ContinuousEngine(model, [], 0).generate(requests()))


def test_a_million_requests_are_not_handed_over_at_once() -> None:
    engine = ContinuousEngine(small_model(), [], 0)
    engine.rows = 2
    taken = 0

    def endless() -> Iterator[Request]:
        nonlocal taken
        for request in requests(40, 2):
            taken += 1
            yield request

    waiting: list[int] = []
    original = engine._manager

    def watched(order: Any, open_requests: dict[str, Request]) -> Any:
        manager = original(order, open_requests)
        add = manager.add_request
        manager.add_request = lambda *args, **kwargs: (
            waiting.append(len(open_requests)),
            add(*args, **kwargs),
        )[1]
        return manager

    engine._manager = watched  # type: ignore[method-assign]
    assert len(list(engine.generate(endless()))) == taken == 40
    assert max(waiting) == 8
