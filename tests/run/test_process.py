"""What every process of a stage sets before it computes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from stages.run import process
from stages.run.process import ALLOCATORS, computes_bf16, fix_arithmetic, prepare_process


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment of its own, so that the tests after it keep theirs."""
    values: dict[str, str] = {name: value for name, value in os.environ.items() if name not in ALLOCATORS}
    monkeypatch.setattr(process.os, "environ", values)
    return values


@pytest.mark.parametrize("by_user", [None, *ALLOCATORS])
def test_cuda_memory_grows_in_segments_unless_the_user_said_otherwise(
    environment: dict[str, str], by_user: str | None
) -> None:
    """torch reads the newer name only where the older one is not set, so both count."""
    if by_user:
        environment[by_user] = "max_split_size_mb:64"
    prepare_process()
    wanted = {by_user: "max_split_size_mb:64"} if by_user else {ALLOCATORS[0]: "expandable_segments:True"}
    assert {name: value for name, value in environment.items() if name in ALLOCATORS} == wanted


def test_cudnn_attention_is_off_and_the_other_kernels_stay() -> None:
    """It builds a plan for each new shape, and decoding has one at nearly every step."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    fix_arithmetic(None, 0)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()


@pytest.mark.parametrize(
    ("flags", "has"),
    [
        ("fpu sse avx2 avx512f avx512_bf16 avx512_fp16", True),
        ("fpu sse avx2 amx_bf16 amx_tile amx_int8", True),
        ("fpu sse avx2 avx512f avx512_vnni", False),
        (None, False),
    ],
)
def test_bf16_is_computed_where_the_processor_can(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str | None, has: bool
) -> None:
    """Linux lists what a processor can; another system has no such list."""
    monkeypatch.setattr(process, "CPU_INFO", tmp_path / "cpuinfo")
    if flags:
        (tmp_path / "cpuinfo").write_text(f"model name : x\nflags\t\t: {flags}\n")
    assert computes_bf16() is has
