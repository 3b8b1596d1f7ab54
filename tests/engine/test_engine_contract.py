"""What every text generation engine promises, on a small random model of Mistral's architecture.

The tests that take `make` run against each engine this machine has. The other tests are about what only the
transformers engine promises (docs/gpus.md).
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.engine.transformers_engine import LEAVE_SHARE, TransformersEngine
from stages.engine.vllm_engine import VllmEngine
from stages.policy.request import Completion, Engine, Request, request_seed
from stages.run.errors import UserError
from tests.policy import END, NEEDS_VLLM, PAD, VOCABULARY, complete, mixed_requests, prompts

ENGINES = ["transformers", pytest.param("vllm", marks=NEEDS_VLLM)]
Make = Callable[..., Engine]


@pytest.fixture(scope="module", params=ENGINES)
def make(request: pytest.FixtureRequest, model: Any, policy_folder: Path) -> Make:
    """Makes an engine of each kind that computes `batch` rows at once and stops at `ends`."""
    if request.param == "transformers":
        return lambda batch=16, ends=END: in_memory(model, batch, ends)
    engine = VllmEngine(policy_folder / "adapter", policy_folder / "base")

    def again(batch: int = 16, ends: Sequence[int] = END) -> Engine:
        engine.end_ids = list(ends)
        return engine

    return again


def in_memory(model: Any, batch: int = 16, ends: Sequence[int] = END) -> Engine:
    return TransformersEngine(model, ends, PAD, batch)


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_greedy_is_what_transformers_generates(model: Any, make: Make, batch: int) -> None:
    """Each prompt alone through transformers' own `generate` gives the same tokens and the same end."""
    requests = [Request(str(i), prompt, 25) for i, prompt in enumerate(prompts(30))]
    ours = complete(make(batch), requests)
    for request in requests:
        ids = torch.tensor([request.prompt])
        with torch.no_grad():
            theirs = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=25, do_sample=False,
                eos_token_id=END, pad_token_id=PAD,
            )[0, ids.shape[1] :].tolist()  # fmt: skip
        stopped = theirs[-1] in END
        assert ours[request.id].tokens == tuple(theirs[:-1] if stopped else theirs)
        assert ours[request.id].finish == ("stop" if stopped else "length")
    assert {one.finish for one in ours.values()} == {"stop", "length"}  # both ends were seen


def test_a_request_does_not_depend_on_its_neighbours(model: Any) -> None:
    """Order, batch size and neighbours change no token, because every request has its own seed."""
    requests = mixed_requests()
    wanted = complete(in_memory(model), requests)
    shuffled = random.Random(2).sample(requests, len(requests))
    for other in (
        complete(in_memory(model), shuffled),
        complete(in_memory(model, batch=1), requests),
        complete(in_memory(model, batch=23), shuffled),
    ):
        assert other.keys() == wanted.keys()
        for identity, one in wanted.items():
            assert other[identity].tokens == one.tokens
            assert other[identity].finish == one.finish
            assert other[identity].logprob == pytest.approx(one.logprob, abs=1e-3)


def test_a_resumed_run_gives_the_same_bits(model: Any) -> None:
    """Whatever was done before the interruption, the rest comes out as if there had been none."""
    requests = mixed_requests()
    engine = in_memory(model)
    whole = complete(engine, requests)
    assert complete(engine, requests) == whole
    for seed in range(4):
        rng = random.Random(seed)
        done = frozenset(rng.sample(sorted(whole), rng.randint(1, len(whole) - 1)))
        rest = complete(engine, requests, done)
        assert rest == {identity: one for identity, one in whole.items() if identity not in done}


def test_nothing_is_computed_when_all_is_done(make: Make) -> None:
    requests = mixed_requests()
    assert complete(make(), requests, frozenset(one.id for one in requests)) == {}
    assert complete(make(), []) == {}


def test_completions_come_as_they_finish(make: Make) -> None:
    """A short completion does not wait for a long one, and the caller may stop early."""
    first, second = prompts(2)
    engine = make(ends=[])
    running = engine.generate([Request("long", first, 40), Request("short", second, 2)])
    assert next(iter(running)).id == "short"
    running.close()  # type: ignore[attr-defined]
    assert complete(engine, [Request("again", second, 2)]).keys() == {"again"}


def test_each_request_has_its_own_temperature_top_p_and_seed(make: Make) -> None:
    """In one batch, cold and narrow draws equal greedy ones, and only equal seeds agree."""
    prompt = prompts(1)[0]
    limit = 20
    got = complete(
        make(),
        [
            Request("greedy", prompt, limit),
            Request("cold", prompt, limit, 0.001, 1.0, 11),
            Request("narrow", prompt, limit, 1.5, 1e-6, 12),
            Request("warm", prompt, limit, 1.5, 1.0, 13),
            Request("warm again", prompt, limit, 1.5, 1.0, 13),
            Request("other seed", prompt, limit, 1.5, 1.0, 14),
        ],
    )
    assert got["cold"].tokens == got["narrow"].tokens == got["greedy"].tokens
    assert got["warm"].tokens == got["warm again"].tokens
    assert len({got[name].tokens for name in ("greedy", "warm", "other seed")}) == 3


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.4, 0.6)])
def test_drawn_tokens_follow_the_models_distribution(
    model: Any, make: Make, temperature: float, top_p: float
) -> None:
    """4,000 first tokens against the softmax; none comes from outside the nucleus."""
    prompt, draws = prompts(1, seed=8)[0], 4000
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    wanted = (logits / temperature).softmax(-1)
    ranked, order = wanted.sort(descending=True)
    inside = order[: int((ranked.cumsum(-1) < top_p).sum()) + 1] if top_p < 1 else order
    expected = torch.zeros(VOCABULARY)
    expected[inside] = wanted[inside] / wanted[inside].sum()

    requests = [Request(str(i), prompt, 1, temperature, top_p, request_seed(0, str(i))) for i in range(draws)]
    counts = torch.zeros(VOCABULARY)
    for one in make(1000, [PAD]).generate(requests):
        counts[one.tokens[0] if one.tokens else PAD] += 1
    assert counts[expected == 0].sum() == 0
    spread = (expected * (1 - expected) / draws).sqrt()
    assert ((counts / draws - expected).abs() <= 5 * spread + 1e-9).all()


def test_logprob_is_that_of_a_fresh_forward_pass(model: Any, make: Make) -> None:
    """It is the sum over all new tokens, with the end token, at temperature 1, even if the request has another."""
    requests = mixed_requests()
    completions = complete(make(), requests)
    for request in requests:
        one = completions[request.id]
        with torch.no_grad():
            ids = torch.tensor([[*request.prompt, *one.tokens]])
            logprobs = model(ids).logits[0].float().log_softmax(-1)
        start = len(request.prompt) - 1
        total = sum(logprobs[start + i, token].item() for i, token in enumerate(one.tokens))
        if one.finish == "length":
            assert one.logprob == pytest.approx(total, abs=3e-4)
        else:  # one of the end tokens closed it
            ends = [total + logprobs[start + len(one.tokens), end].item() for end in END]
            assert min(abs(one.logprob - end) for end in ends) < 3e-4


def test_every_request_keeps_to_its_own_limit(make: Make) -> None:
    """Without an end token each completion is exactly as long as its limit, and `finish` says so."""
    requests = [
        Request(str(limit), prompt, limit) for limit, prompt in zip(range(1, 21), prompts(20), strict=True)
    ]
    for one in make(8, []).generate(requests):
        assert len(one.tokens) == int(one.id)
        assert one.finish == "length"


def test_a_row_that_ends_leaves_its_batch(model: Any) -> None:
    """The forward passes get narrower, so that a long answer costs no work on the finished ones.

    Finished rows are removed once they are an eighth of the batch.
    """
    widths = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    try:
        requests = [
            Request(str(limit), prompt, limit)
            for limit, prompt in zip(range(1, 13), prompts(12), strict=True)
        ]
        list(TransformersEngine(model, [VOCABULARY + 1], PAD, 12).generate(requests))
    finally:
        handle.remove()
    assert len(widths) == 12
    for step, width in enumerate(widths):
        finished = width - (12 - step)
        assert 0 <= finished < width / LEAVE_SHARE


def test_a_shared_prompt_is_read_once(model: Any) -> None:
    widths = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        prompt = prompts(1)[0]
        list(in_memory(model).generate([Request(str(k), prompt, 3, 1.0, 1.0, k) for k in range(9)]))
    finally:
        handle.remove()
    assert widths[0] == (1, len(prompt))
    assert widths[1][1] == 1


def test_the_output_layer_gets_no_view(model: Any) -> None:
    """A view of the last tokens would make torch copy that layer's weights once for each row."""
    seen: list[tuple[int, bool]] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: seen.append((inputs[0].shape[1], inputs[0].is_contiguous()))
    )
    try:
        complete(in_memory(model), [Request(str(i), prompt, 3) for i, prompt in enumerate(prompts(4))])
    finally:
        hook.remove()
    assert len(seen) > 1  # the prompts, then single tokens
    assert set(seen) == {(1, True)}


def test_the_cache_grows_by_doubling_and_never_beyond_the_longest_row(model: Any) -> None:
    """A long answer copies what is there a few times, not every 64 tokens."""
    rooms: list[int] = []
    handle = model.register_forward_hook(
        lambda module, args, kwargs, output: rooms.append(
            kwargs["past_key_values"].layers[0].key_store.shape[-2]
        ),
        with_kwargs=True,
    )
    try:
        prompt, limit = prompts(1)[0], 200
        (one,) = TransformersEngine(model, [VOCABULARY + 1], PAD, 1).generate([Request("a", prompt, limit)])
    finally:
        handle.remove()
    assert len(one.tokens) == limit == len(rooms)
    first, most = len(prompt), len(prompt) + limit
    assert rooms[:2] == [first, 2 * (first + 1)] and rooms[-1] == most == max(rooms)
    assert len(set(rooms)) <= (most // first).bit_length() + 1


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_the_mode_it_was_in(model: Any, training: bool) -> None:
    """DPO generates while it trains."""
    model.train(training)
    try:
        complete(in_memory(model), mixed_requests()[:4])
        assert model.training is training
    finally:
        model.eval()


CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


@pytest.mark.parametrize(("most", "error"), [(1, torch.OutOfMemoryError("simulated")), (5, CUBLAS)])
def test_out_of_memory_halves_the_batch(
    model: Any, monkeypatch: pytest.MonkeyPatch, most: int, error: RuntimeError
) -> None:
    """Every request is completed as in a batch that fits, and later batches start at a size that fits."""
    requests = mixed_requests()
    wanted = complete(in_memory(model, batch=1), requests)
    sizes: list[int] = []
    forward = type(model).forward

    def limited(self: Any, *args: Any, **kwargs: Any) -> Any:
        rows = len(kwargs["input_ids"])
        if rows > most and kwargs["input_ids"].shape[1] == 1:  # once prompts were read
            sizes.append(rows)
            raise error
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", limited)
    found = complete(in_memory(model, batch=16), requests)
    assert found.keys() == wanted.keys()
    assert all(found[key].tokens == one.tokens for key, one in wanted.items())
    assert len(sizes) <= 4  # 16, 8, 4, 2: once, and not again for every batch


def test_another_failure_is_raised_as_it_is(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(type(model), "forward", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        complete(in_memory(model, batch=16), mixed_requests())


def test_one_row_out_of_memory(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing left to halve."""

    def never(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(type(model), "forward", never)
    with pytest.raises(UserError, match="out of memory with one row of up to 8 tokens; lower max_new_tokens"):
        complete(in_memory(model), [Request("a", (3, 4, 5), 5), Request("b", (3, 4, 6), 5)])


def test_the_batch_may_follow_from_the_requests(model: Any) -> None:
    """`generation_batch: auto` computes it from the longest prompt and the highest limit."""
    asked: list[tuple[int, int]] = []

    def rows(prompt: int, new: int) -> int:
        asked.append((prompt, new))
        return 16

    requests = mixed_requests()
    made = {one.id: one for one in TransformersEngine(model, END, PAD, rows).generate(requests)}
    assert made == complete(in_memory(model, batch=16), requests)
    assert asked == [(max(len(one.prompt) for one in requests), max(one.max_new_tokens for one in requests))]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_batches_side_by_side_give_the_same_bits(model: Any) -> None:
    """Two threads take a batch each, and each computes as one thread does alone."""
    requests = mixed_requests()
    both = complete(in_memory(model), requests)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert complete(in_memory(model), requests) == both


@pytest.mark.usefixtures("two_threads")
def test_whoever_stops_listening_stops_the_threads(model: Any) -> None:
    before = threading.active_count()
    engine = in_memory(model, 4)
    completions = iter(engine.generate(mixed_requests()))
    next(completions)
    completions.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


@pytest.mark.usefixtures("two_threads")
def test_an_error_in_a_thread_is_raised(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = in_memory(model, 4)

    def fail(batch: Any) -> Iterator[Completion]:
        raise UserError("no room")

    monkeypatch.setattr(engine, "_fitting", fail)
    with pytest.raises(UserError, match="no room"):
        list(engine.generate(mixed_requests()))
