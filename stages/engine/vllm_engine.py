"""Generation by vLLM on one GPU, with the adapter applied unmerged. Each of several GPUs gets a process of its own.

requirements-gpu.txt installs vLLM. This engine was tried with vLLM 0.30.0 on a CPU and has not run on a GPU yet
(docs/gpus.md).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from stages.policy.adapter import ADAPTER_CONFIG, load_tokenizer
from stages.policy.request import Completion, EngineStartError, Request, end_ids
from stages.run.errors import UserError
from stages.run.paths import BASE

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the adapter ranks that vLLM can reserve room for
AHEAD = 4096  # requests that vLLM holds at a time, so that a million of them need no memory
SETTINGS = {
    # Run inside this process: a failure is raised here, and a kill leaves nothing on the GPU.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class VllmEngine:
    """Completes requests with the model of a checkpoint folder and `adapter` (or none).

    Every request has its own seed. Raises EngineStartError when vLLM does not start, RuntimeError when a request is
    lost. vLLM cannot go on after a later failure: its error is raised as it is and ends the process.
    """

    def __init__(self, adapter: Path | None, base: Path = BASE) -> None:
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        _own_cache()
        import torch
        from transformers import AutoConfig, GenerationConfig
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        config = AutoConfig.from_pretrained(base, local_files_only=True)
        generation_config = GenerationConfig.from_pretrained(base, local_files_only=True)
        self.end_ids = end_ids(load_tokenizer(base), generation_config)
        more: dict[str, Any] = {}
        if adapter is not None:
            more = {"enable_lora": True, "max_loras": 1, "max_lora_rank": _room(adapter)}
        if not torch.cuda.is_available():  # its part for CPUs cannot read a seeded request's prompt in pieces
            tokens = max(8192, config.max_position_embeddings)
            more |= {"enable_chunked_prefill": False, "max_num_batched_tokens": tokens}
        # The stages' deterministic mode holds for the whole process. vLLM's kernels are not made for it: their order of
        # sums depends on what runs together all the same, and it would only slow them down.
        torch.use_deterministic_algorithms(False)
        self.lora = LoRARequest(adapter.name, 1, str(adapter.resolve())) if adapter is not None else None
        try:
            self.llm = LLM(
                model=str(base),
                dtype=config.dtype,  # "auto" would make 16 bits of 32
                seed=0,
                max_model_len=-1,  # the model's own, or what there is memory for
                generation_config="vllm",  # the requests say all there is to say, not the model's file
                logprobs_mode="raw_logprobs",  # at temperature 1, before top_p
                use_tqdm_on_load=False,
                **more,
            )
        except (ValueError, RuntimeError, OSError) as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise EngineStartError(
                f"vLLM did not start ({reason}); see to that, or set hardware.engine to transformers"
            ) from error

    def generate(
        self, requests: Iterable[Request], done: frozenset[str] = frozenset()
    ) -> Iterator[Completion]:
        """See `Engine.generate`."""
        from vllm.inputs import tokens_input

        engine = self.llm.llm_engine
        waiting = (request for request in requests if request.id not in done)
        running: dict[str, Request] = {}
        try:
            while True:
                while len(running) < AHEAD and (request := next(waiting, None)):
                    running[request.id] = request
                    prompt = tokens_input(list(request.prompt))
                    engine.add_request(request.id, prompt, self._params(request), lora_request=self.lora)
                if not running:
                    return
                for output in engine.step():
                    if output.finished:
                        yield self._completion(running.pop(output.request_id), output.outputs[0])
                if running and not engine.has_unfinished_requests():
                    raise RuntimeError(f"vLLM lost {len(running)} requests, {next(iter(running))} the first")
        except GeneratorExit:  # whoever asked has stopped listening
            engine.abort_request(list(running))
            raise

    def _params(self, request: Request) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        drawn = request.temperature > 0
        return SamplingParams(
            temperature=request.temperature,
            top_p=request.top_p if drawn else 1.0,
            seed=request.seed if drawn else None,
            max_tokens=request.max_new_tokens,
            stop_token_ids=self.end_ids,
            ignore_eos=True,  # stop_token_ids has them all
            logprobs=0,  # of the sampled token alone
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _completion(self, request: Request, output: Any) -> Completion:
        tokens = tuple(output.token_ids)
        if output.finish_reason not in ("stop", "length") or not tokens or output.cumulative_logprob is None:
            raise RuntimeError(f"vLLM gave up {request.id}: {output.finish_reason}")
        stopped = tokens[-1] in self.end_ids
        return Completion(
            request.id,
            tokens[:-1] if stopped else tokens,
            "stop" if stopped else "length",
            float(output.cumulative_logprob),
        )


def _own_cache() -> None:
    """Give the process of each GPU a folder of its own for compiled code.

    vLLM names a folder by what it compiles and by its rank (compilation/backends.py). That is 0 in each of our
    processes, so they would all write the same files when they start together.
    """
    device = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not device:  # this process is the only one
        return
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(os.environ.get("VLLM_CACHE_ROOT") or caches / "vllm")
    own = f"gpu-{device}"
    if root.name != own:  # not from an earlier engine of this process
        os.environ["VLLM_CACHE_ROOT"] = str(root / own)


def _room(adapter: Path) -> int:
    """The smallest rank in RANKS that holds the adapter's."""
    rank = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))["r"]
    if rank > RANKS[-1]:
        raise UserError(
            f"{adapter}: vLLM takes adapters up to rank {RANKS[-1]}; set hardware.engine: transformers"
        )
    return next(size for size in RANKS if size >= rank)
