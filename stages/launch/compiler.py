"""Looks whether Triton can build kernels on this host: for that it needs a C compiler and Python's headers.

TRL computes log-probabilities by a Triton kernel in every training step on a GPU (trl/kernels/chunked_logprob.py), and
Triton builds a small C library for it (triton/runtime/build.py). Neither the compiler nor the headers come with pip.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

KERNEL = Path(__file__).with_name("kernel.py")


def compiler_problem() -> str:
    """What keeps a kernel of one line from being built and run on the GPU, and what to install; or ''."""
    done = subprocess.run([sys.executable, "-P", str(KERNEL)], capture_output=True, text=True, check=False)
    if not done.returncode:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or [
        f"status {done.returncode}"
    ]
    reason = next((line for line in lines if "fatal error: " in line), lines[-1])
    python = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
    return (
        f"Triton cannot build a kernel, which training on a GPU needs ({reason}). If the compiler or Python.h is "
        f"missing: sudo apt-get install -y gcc libc6-dev {python}"
    )
