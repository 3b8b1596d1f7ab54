"""Sets up the process of a stage: quiet, offline, and with the same arithmetic every time.

`prepare_process` runs before torch or a hub library is imported, because they read these settings on import.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from pathlib import Path

OFFLINE = "HF_HUB_OFFLINE"  # transformers and datasets follow it too
SILENT = {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
DEFAULTS = {
    # Idle threads of OpenMP sleep. Otherwise they spin, and two programs on the same cores stop each other.
    "OMP_WAIT_POLICY": "PASSIVE",
    # MKL's sums do not depend on where in memory the numbers lie, so a second run gives the same bytes.
    "MKL_CBWR": "AUTO",
}
CPU_INFO = Path("/proc/cpuinfo")
BF16_FLAGS = {"amx_bf16", "avx512_bf16"}  # the instructions that multiply bf16 matrices, as Linux names them
# CUDA memory comes in segments that grow, so that batches of ever new sizes leave no useless gaps between them. torch
# reads the first of these names that is set (c10/cuda/CUDAAllocatorConfig.h).
ALLOCATOR, ALLOCATORS = "expandable_segments:True", ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def prepare_process(network: bool = False) -> None:
    """Set the environment variables that libraries read. `network` leaves the hub reachable (prepare and base only)."""
    os.environ.update(SILENT)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if not any(name in os.environ for name in ALLOCATORS):
        os.environ[ALLOCATORS[0]] = ALLOCATOR
    if not network:
        os.environ[OFFLINE] = "1"
    _keep_freed_memory()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings(
        "ignore", category=UserWarning, module=r"(torch|transformers|trl|peft|accelerate)\b.*"
    )
    # docs/gpus.md says what cannot be deterministic on a GPU; a stage does not repeat it.
    warnings.filterwarnings(
        "ignore", category=UserWarning, message=".*(deterministic implementation|non-deterministic algorithm)"
    )


def fix_arithmetic(threads: int | None, seed: int) -> None:
    """Set the number of threads, deterministic algorithms, and the seed of torch's random numbers.

    cuDNN's attention, which torch prefers on Hopper and Blackwell GPUs (check_prefer_cudnn_attention in its
    sdp_utils.cpp), is switched off: it builds a plan for every new shape and keeps it, and a batch that decodes has a
    new shape at nearly every step.
    """
    import torch

    if threads:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = (
        False  # it costs time, and nothing reads such memory
    )
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.manual_seed(seed)


def computes_bf16() -> bool:
    """Whether this processor has instructions for bf16. Without them it takes far longer than in 32 bits.

    Read from the kernel's list, so that `check` need not import torch; a system without that list has none.
    """
    try:
        return not BF16_FLAGS.isdisjoint(CPU_INFO.read_text(encoding="utf-8").split())
    except OSError:
        return False


def _keep_freed_memory() -> None:
    """Let glibc keep large freed blocks for reuse. Otherwise the kernel clears every page of them again."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        m_trim_threshold, m_mmap_threshold, two_gib = -1, -3, 2**31 - 1  # as in malloc.h
        mallopt(m_mmap_threshold, two_gib)
        mallopt(m_trim_threshold, two_gib)
