"""Generation by transformers' continuous batching: a row that ends makes room for the next request at once.

Keys and values lie in pages, so that rows of any length share one step. Tokens are drawn by the same function and
from the same numbers as in `TransformersEngine`, a stream per request: a request's completion does not depend on
its neighbours, except for the rounding of sums, which follows from what is computed together.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import RequestStatus
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor
from transformers.generation.continuous_batching.utils import WorkloadHints
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from stages.engine.base import Completion, Request
from stages.engine.transformers_engine import draw, uniform_stream

ROWS = 1024  # at once on a GPU, where memory allows
CPU_ROWS = 64
CPU_PAGE = 16  # tokens; a GPU takes the library's own page size
WAITING = 4  # times the rows: requests handed over ahead, so that a million of them need no memory
MEMORY = 0.8  # of what is free on a GPU goes to keys and values
LOGPROB_SCALE = 64.0  # see _Choice


class ContinuousEngine:
    """Completes requests with `model` (a transformers or PEFT causal model; an adapter stays unmerged).

    After the first completion, `kernel` names the attention in use. Without flash attention this engine is several
    times slower on a GPU, and `auto` takes another one. Raises RuntimeError when a request comes back failed or not
    at all.
    """

    def __init__(self, model: Any, end_ids: Sequence[int], pad_id: int) -> None:
        self.model = model.get_base_model() if hasattr(model, "peft_config") else model
        self.end_ids = sorted(set(end_ids))
        self.pad_id = pad_id
        self.on_gpu = self.model.device.type == "cuda"
        self.rows = ROWS if self.on_gpu else CPU_ROWS
        self.memory = MEMORY
        self.kernel: str | None = None

    def generate(
        self, requests: Iterable[Request], done: frozenset[str] = frozenset()
    ) -> Iterator[Completion]:
        """See `Engine.generate`; with fewer rows at once when they do not fit into memory."""
        wanted = {request.id: request for request in requests if request.id not in done}
        config, training = self.model.config, self.model.training
        window, attention = getattr(config, "sliding_window", None), config._attn_implementation
        longest = max((len(one.prompt) + one.max_new_tokens for one in wanted.values()), default=0)
        try:
            if window is not None and longest <= window:
                config.sliding_window = (
                    None  # nothing is out of sight, but a window keeps the fast kernels from running
                )
            while wanted:
                try:
                    for completion in self._session(list(wanted.values())):
                        del wanted[completion.id]
                        yield completion
                except torch.OutOfMemoryError:
                    if self.rows == 1:
                        raise
                    self.rows, self.memory = self.rows // 2, self.memory * 0.75
                if wanted:
                    gc.collect()  # what the error held on to
        finally:
            if window is not None:
                config.sliding_window = window
            if config._attn_implementation != attention:
                self.model.set_attn_implementation(attention)
            self.model.train(training)

    def _session(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Complete all requests, or raise what stopped the library's thread."""
        order = sorted(requests, key=lambda one: (len(one.prompt), one.prompt))  # shared prompts side by side
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # what goes wrong is raised
        open_requests: dict[str, Request] = {}
        manager = self._manager(order, open_requests)
        waiting, finished, failure = iter(order), 0, None
        try:
            if self.on_gpu:
                manager.warmup()
            manager.start()
            while finished < len(order) and failure is None:
                while len(open_requests) < WAITING * self.rows and (request := next(waiting, None)):
                    open_requests[request.id] = request
                    manager.add_request(
                        list(request.prompt),
                        request_id=request.id,
                        max_new_tokens=request.max_new_tokens,
                        eos_token_id=self.end_ids,
                    )
                result = manager.get_result(timeout=1)
                if result is None:
                    failure = None if manager.is_running() else "it ended early"
                elif result.status == RequestStatus.FAILED:
                    failure = result.error or "no reason given"
                else:
                    finished += 1
                    yield self._completion(open_requests.pop(result.request_id), result)
        finally:
            manager.stop(block=True, hard_stop=True)
            manager.destroy()
        if failure is not None:
            error = manager.background_thread_status.fatal_error
            if isinstance(error, torch.OutOfMemoryError):
                raise error
            left = len(order) - finished
            raise RuntimeError(f"continuous batching left {left} requests undone: {failure}") from error

    def _completion(self, request: Request, result: Any) -> Completion:
        tokens = result.generated_tokens
        if not 0 < len(tokens) <= request.max_new_tokens or len(result.logprobs) != len(tokens):
            raise RuntimeError(f"continuous batching gave {request.id} {len(tokens)} tokens")
        stopped = tokens[-1] in self.end_ids
        logprob = float(np.sum(result.logprobs) * LOGPROB_SCALE)
        return Completion(
            request.id, tuple(tokens[:-1] if stopped else tokens), "stop" if stopped else "length", logprob
        )

    def _manager(self, requests: Sequence[Request], open_requests: dict[str, Request]) -> Any:
        """The library's manager, on the best attention there is, choosing tokens our way."""
        longest = max(len(one.prompt) + one.max_new_tokens for one in requests)
        rows = min(self.rows, len(requests))
        settings: dict[str, Any] = {"max_requests_per_batch": rows, "return_logprobs": True}
        known = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
        if self.on_gpu:
            settings["max_memory_percent"] = self.memory
        else:
            page = "page_size" if "page_size" in known else "block_size"  # its name before transformers 5.18
            settings |= {
                page: CPU_PAGE,
                "num_blocks": rows * (longest // CPU_PAGE + 2),
                "max_batch_tokens": 1024,
            }
        # Flash attention computes in half precision only.
        flash = self.on_gpu and self.model.dtype in (torch.float16, torch.bfloat16)
        original = self.model.config._attn_implementation
        while True:
            if "auto_switch_to_flash" in known:
                settings["auto_switch_to_flash"] = flash
            elif not flash and not original.startswith("paged|"):  # before transformers 5.23
                self.model.set_attn_implementation(f"paged|{original}")
            try:
                manager = self.model.init_continuous_batching(
                    generation_config=GenerationConfig(
                        do_sample=False, eos_token_id=self.end_ids, pad_token_id=self.pad_id
                    ),
                    continuous_batching_config=ContinuousBatchingConfig(**settings),
                    workload_hints=WorkloadHints(
                        max_prompt_length=max(len(one.prompt) for one in requests),
                        max_generated_length=max(one.max_new_tokens for one in requests),
                        num_requests=len(requests),
                    ),
                )
                break
            except (
                ImportError,
                OSError,
                RuntimeError,
                ValueError,
            ):  # a kernel that is named but cannot be loaded
                if not flash:
                    raise
                flash = False
        if self.kernel is None:
            self.kernel = self.model.config._attn_implementation
            if self.on_gpu:
                slow = "" if "flash" in self.kernel else "; hardware.engine: transformers may well be faster"
                print(f"generation: continuous batching, attention {self.kernel}{slow}", file=sys.stderr)
        _choose_tokens(manager, requests, open_requests)
        return manager


def _choose_tokens(manager: Any, requests: Sequence[Request], open_requests: dict[str, Request]) -> None:
    """Have a manager that was made for greedy decoding draw by `draw`."""
    streams: dict[str, np.ndarray] = {}

    def uniform(request: Request, place: int) -> float:
        if request.temperature == 0:
            return 0.0
        if request.id not in streams:
            for gone in streams.keys() - open_requests.keys():
                del streams[gone]
            streams[request.id] = uniform_stream(request)
        return float(streams[request.id][min(place, request.max_new_tokens - 1)])

    temperature = _Setting(open_requests, lambda request, place: request.temperature)
    top_p = _Setting(open_requests, lambda request, place: request.top_p)
    number = _Setting(open_requests, uniform)
    nucleus = any(one.temperature > 0 and one.top_p < 1 for one in requests)
    processors = [temperature, *([top_p] if nucleus else []), number]
    chain = manager.logit_processor
    chain.logits_processor = LogitsProcessorList(
        [*processors, _Choice(temperature, top_p if nucleus else None, number)]
    )
    chain.tensors_required, chain.do_processing = len(processors), True


class _Setting(ContinuousBatchingLogitsProcessor):
    """Carries one number per row to the device; `values` are those of the step being computed."""

    supported_kwargs: ClassVar[dict[str, type]] = {}
    ignored_kwargs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, open_requests: dict[str, Request], number: Any) -> None:
        self.open_requests, self.number = open_requests, number

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """Rows that only fill up a batch are greedy."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        """float32 numbers in int32 clothing, as the library stores all settings."""
        numbers = []
        for row in requests_with_new_token:
            request = self.open_requests.get(row.state.request_id)  # None: a warm-up, or one just finished
            # The position counts the prompt too; it stays right when the library drops and recomputes a row.
            numbers.append(
                self.number(request, row.state.position_offset - len(request.prompt)) if request else 0.0
            )
        return torch.tensor(numbers, dtype=torch.float32).view(torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        self.values = tensor_arg[: scores.shape[0]].view(torch.float32)
        return scores


class _Choice(LogitsProcessor):
    """Draws the tokens, and leaves scores from which the library cannot but take them.

    The library takes the largest score and reports the logarithm of its softmax. All scores but two are minus
    infinity: that of the drawn token, and one just so much lower that the report is the token's log-probability at
    temperature 1 divided by LOGPROB_SCALE. Rounding moves it by less than 1e-5 a token.
    """

    supports_continuous_batching = True

    def __init__(self, temperature: _Setting, top_p: _Setting | None, uniform: _Setting) -> None:
        self.temperature, self.top_p, self.uniform = temperature, top_p, uniform

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        top_p = self.top_p.values if self.top_p else None
        chosen = draw(scores, self.temperature.values, top_p, self.uniform.values)[:, None]
        logprob = scores.log_softmax(-1).gather(1, chosen)
        # report = -log(1 + exp(low)), so low = log(exp(-report) - 1); below log 2, low is negative: the token wins.
        report = (-logprob / LOGPROB_SCALE).clamp(max=0.69)
        low = report.expm1().log()
        other = (chosen == 0).to(chosen.dtype)
        return torch.full_like(scores, -torch.inf).scatter(1, other, low).scatter(1, chosen, 0.0)
