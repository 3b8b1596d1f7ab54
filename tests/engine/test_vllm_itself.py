"""vLLM itself in several processes: when one is killed, another one does its piece again.

test_engine_contract.py tests vLLM as an engine, and test_vllm_engine.py tests what happens when it fails.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from stages.engine import handout
from stages.engine.transformers_engine import TransformersEngine
from stages.engine.workers import WorkersEngine
from stages.policy.request import Request
from stages.run.params import load_params
from stages.run.paths import BASE
from tests.policy import END, NEEDS_VLLM, PAD, SMALL, complete, prompts

pytestmark = NEEDS_VLLM


def test_a_process_that_is_killed(
    model: Any, policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes; one is killed while it generates. Every greedy answer comes, once, as transformers gives it."""
    monkeypatch.chdir(tmp_path)
    BASE.parent.mkdir()
    BASE.symlink_to(policy_folder / "base")
    hardware = load_params(SMALL).hardware.model_copy(update={"engine": "vllm", "generation_batch": "auto"})
    monkeypatch.setattr(handout, "PIECE", 25)  # four turns for each process
    requests = [Request(str(i), prompt, 40) for i, prompt in enumerate(prompts(200))]
    wanted = complete(TransformersEngine(model, END, PAD, 64), requests)
    found = []
    with WorkersEngine(policy_folder / "adapter", hardware, 2) as engine:
        for completion in engine.generate(requests):
            found.append(completion)
            if len(found) == 20:
                killed = next(worker.process for worker in engine.workers if worker.piece)
                os.kill(killed.pid, signal.SIGKILL)
        assert killed not in [worker.process for worker in engine.workers]
    assert len(found) == len(requests)
    for one in found:
        assert one.tokens == wanted[one.id].tokens
        assert one.finish == wanted[one.id].finish
        assert one.logprob == pytest.approx(wanted[one.id].logprob, abs=1e-3)
