"""The vLLM engine with a stand-in for vLLM that loses and finishes requests as a test wants.

The stand-in takes no argument that vLLM 0.30.0 does not have, and generates with `TransformersEngine`. It shows that
the engine asks for the right things and handles what comes back. vLLM itself runs in test_engine_contract.py and
test_vllm_itself.py, where it is installed.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.engine import vllm_engine
from stages.engine.transformers_engine import TransformersEngine
from stages.engine.vllm_engine import VllmEngine
from stages.policy.adapter import load_policy
from stages.policy.request import Completion, EngineStartError, Request, request_seed
from stages.run.errors import UserError
from tests.policy import END, PAD


class RequestOutputKind(enum.Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclasses.dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE


@dataclasses.dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


class LLM:
    """`llm_engine` finishes one request a step, the newest one first."""

    made: list[LLM]

    def __init__(
        self,
        model: str,
        *,
        dtype: str | torch.dtype = "auto",
        seed: int = 0,
        max_model_len: int | None = None,
        generation_config: str = "auto",
        logprobs_mode: str = "raw_logprobs",
        use_tqdm_on_load: bool = True,
        enable_lora: bool = False,
        max_loras: int = 1,
        max_lora_rank: int = 16,
        enable_chunked_prefill: bool | None = None,
        max_num_batched_tokens: int | None = None,
    ) -> None:
        assert max_lora_rank in (1, 8, 16, 32, 64, 128, 256, 320, 512)
        assert dtype is torch.float32  # the model's own; "auto" would halve it
        assert (generation_config, logprobs_mode) == ("vllm", "raw_logprobs")
        self.model, self.enable_lora, self.max_lora_rank = model, enable_lora, max_lora_rank
        self.llm_engine = self
        self.policy: dict[str | None, Any] = {}
        self.queue: list[tuple[Request, SamplingParams, LoRARequest | None]] = []
        self.most, self.steps, self.aborted = 0, 0, []
        self.loses = None
        LLM.made.append(self)

    def add_request(
        self,
        request_id: str,
        prompt: dict[str, Any],
        params: SamplingParams,
        lora_request: LoRARequest | None = None,
    ) -> str:
        assert prompt["type"] == "token"
        assert (lora_request is not None) == self.enable_lora
        assert 0 < params.top_p <= 1 and params.max_tokens
        assert not params.detokenize and params.output_kind is RequestOutputKind.FINAL_ONLY
        request = Request(
            request_id, tuple(prompt["prompt_token_ids"]), params.max_tokens,
            params.temperature, params.top_p, params.seed or 0,
        )  # fmt: skip
        assert (params.seed is None) == (params.temperature == 0)
        self.queue.append((request, params, lora_request))
        self.most = max(self.most, len(self.queue))
        return f"{request_id}-5f3a"  # vLLM's own id, made unique; the outputs carry the caller's

    def has_unfinished_requests(self) -> bool:
        return bool(self.queue)

    def abort_request(self, request_ids: list[str], internal: bool = False) -> None:
        self.aborted += request_ids
        self.queue = [one for one in self.queue if one[0].id not in request_ids]

    def step(self) -> list[Any]:
        self.steps += 1
        request, params, lora = self.queue.pop()
        if request.id == self.loses:
            return []
        folder = lora.lora_path if lora else None
        if folder not in self.policy:
            self.policy[folder] = load_policy(Path(folder) if folder else None, Path(self.model))[0]
        assert params.ignore_eos and params.stop_token_ids
        assert params.logprobs == 0  # the log-probability of the sampled token alone
        (one,) = TransformersEngine(self.policy[folder], params.stop_token_ids, 0, 1).generate([request])
        tokens = [*one.tokens, END[0]] if one.finish == "stop" else list(one.tokens)
        output = types.SimpleNamespace(
            token_ids=tokens, cumulative_logprob=one.logprob, finish_reason=one.finish, stop_reason=None
        )
        running = types.SimpleNamespace(request_id=request.id, finished=False, outputs=[])
        return [running, types.SimpleNamespace(request_id=request.id, finished=True, outputs=[output])]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def module(name: str, **content: Any) -> None:
        made = types.ModuleType(name)
        vars(made).update(content)
        monkeypatch.setitem(sys.modules, name, made)

    LLM.made = []
    module("vllm", LLM=LLM, SamplingParams=SamplingParams)
    module("vllm.inputs", tokens_input=lambda ids: {"type": "token", "prompt_token_ids": ids})
    module("vllm.lora")
    module("vllm.lora.request", LoRARequest=LoRARequest)
    module("vllm.sampling_params", RequestOutputKind=RequestOutputKind)
    for name in (*vllm_engine.SETTINGS, "VLLM_CACHE_ROOT"):
        monkeypatch.setenv(name, "unset")  # so that what the engine sets is taken back
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def base(model: Any, policy_folder: Path) -> Path:
    """A random model with several end tokens, saved as the stage `base` does."""
    return policy_folder / "base"


def requests() -> list[Request]:
    return [
        Request(
            str(i), (10 + i, 20, 30), 15,
            temperature=[0.0, 1.2][i % 2], top_p=[1.0, 0.9][i % 4 // 2], seed=request_seed(1, str(i)),
        )
        for i in range(24)
    ]  # fmt: skip


def completed(engine: Any) -> dict[str, Completion]:
    return {one.id: one for one in engine.generate(requests())}


def test_completions_are_those_of_the_policy(base: Path, policy_folder: Path) -> None:
    """Tokens without the end token, how each ended, its log-probability; with an adapter and without."""
    found, adapter = {}, policy_folder / "adapter"
    for folder in (None, adapter):
        model, _ = load_policy(folder, base)
        wanted = completed(TransformersEngine(model, END, PAD, 8))
        found[folder] = completed(VllmEngine(folder, base))
        assert found[folder].keys() == wanted.keys()
        for identity, one in wanted.items():
            assert found[folder][identity].tokens == one.tokens
            assert found[folder][identity].finish == one.finish
            assert found[folder][identity].logprob == pytest.approx(one.logprob, abs=1e-4)
        assert {one.finish for one in wanted.values()} == {"stop", "length"}
    assert found[None] != found[adapter]


def test_an_end_token_as_the_last_one_allowed_ends_the_completion() -> None:
    """vLLM may report `stop` or `length` then."""
    engine = VllmEngine.__new__(VllmEngine)
    engine.end_ids = END
    for reason in ("stop", "length"):
        output = types.SimpleNamespace(token_ids=[7, 8, 33], cumulative_logprob=-2.5, finish_reason=reason)
        done = engine._completion(Request("a", (1,), 3), output)
        assert done == Completion("a", (7, 8), "stop", -2.5)


@pytest.mark.parametrize(("rank", "room"), [(1, 1), (4, 8), (12, 16), (16, 16), (33, 64), (300, 320)])
def test_room_for_the_adapters_rank(tmp_path: Path, base: Path, rank: int, room: int) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": rank}))
    VllmEngine(tmp_path, base)
    assert LLM.made[0].enable_lora and LLM.made[0].max_lora_rank == room


def test_an_adapter_too_large_is_refused(tmp_path: Path, base: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 600}))
    with pytest.raises(UserError, match=r"up to rank 512; set hardware\.engine: transformers"):
        VllmEngine(tmp_path, base)


def test_the_reason_why_vllm_does_not_start_is_shown(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise ValueError("Free memory on device is less than desired.\nTry another value.")

    monkeypatch.setattr(LLM, "__init__", full)
    with pytest.raises(
        EngineStartError, match=r"^vLLM did not start \(Free memory .* desired\.\); see to that"
    ):
        VllmEngine(None, base)


def test_it_runs_in_this_process_and_reports_to_nobody(base: Path) -> None:
    VllmEngine(None, base)
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
    assert not LLM.made[0].enable_lora


def test_deterministic_mode_is_off_while_vllm_computes(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds for a whole process, and vLLM's kernels and compiled graphs would take slower ways."""
    seen = []
    monkeypatch.setattr(
        LLM, "__init__", lambda *_, **__: seen.append(torch.are_deterministic_algorithms_enabled())
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        VllmEngine(None, base)
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [False]


@pytest.mark.parametrize(
    ("device", "root", "cache"),
    [
        ("6", "/fast", "/fast/gpu-6"),
        ("6", None, "/home/cache/vllm/gpu-6"),
        (None, "/fast", "/fast"),
        ("", None, None),
    ],
)
def test_processes_on_different_gpus_share_no_compile_cache(
    base: Path, monkeypatch: pytest.MonkeyPatch, device: str | None, root: str | None, cache: str | None
) -> None:
    """A second engine in the same process keeps the folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/home/cache")
    for name, value in (("CUDA_VISIBLE_DEVICES", device), ("VLLM_CACHE_ROOT", root)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    for _ in range(2):
        VllmEngine(None, base)
        assert os.environ.get("VLLM_CACHE_ROOT") == cache


def test_finished_requests_are_not_sent_again(base: Path) -> None:
    engine = VllmEngine(None, base)
    done = frozenset(str(i) for i in range(20))
    assert {one.id for one in engine.generate(requests(), done)} == {"20", "21", "22", "23"}
    assert LLM.made[0].steps == 4


def test_vllm_holds_a_limited_number_of_requests(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "AHEAD", 5)
    assert len(completed(VllmEngine(None, base))) == 24
    assert LLM.made[0].most == 5


def test_a_lost_request_is_an_error(base: Path) -> None:
    engine = VllmEngine(None, base)
    LLM.made[0].loses = "7"
    with pytest.raises(RuntimeError, match="vLLM lost 1 requests, 7 the first"):
        completed(engine)


def test_a_caller_that_stops_early_leaves_nothing_running(base: Path) -> None:
    engine = VllmEngine(None, base)
    running = engine.generate(requests())
    next(iter(running))
    running.close()  # type: ignore[attr-defined]
    assert len(LLM.made[0].aborted) == 23
    assert len(completed(engine)) == 24
