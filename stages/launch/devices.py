"""What a stage may use of this host or cluster: who starts its processes, how many, and which engine they run."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from stages.run.errors import UserError
from stages.run.params import Hardware

LAUNCHERS = ("local", "ray")
LOCAL_SETTING = Path(".launcher")  # git-ignored: one word, for hosts that always use the same launcher


def launcher() -> str:
    """`local` (this host) or `ray` (a cluster): LOOPER_LAUNCHER, else the file .launcher, else local.

    Raises UserError for any other word.
    """
    where, word = "LOOPER_LAUNCHER", os.environ.get("LOOPER_LAUNCHER", "")
    if not word and LOCAL_SETTING.is_file():
        where, word = str(LOCAL_SETTING), LOCAL_SETTING.read_text(encoding="utf-8").strip()
    if word and word not in LAUNCHERS:
        raise UserError(f"{where}: no launcher '{word}'; choose one of {', '.join(LAUNCHERS)}")
    return word or "local"


def host_processes(hardware: Hardware) -> int:
    """How many processes to start on this host: `hardware.processes`, or one for each GPU."""
    return max(1, visible_gpus()) if hardware.processes == "auto" else hardware.processes


def visible_gpus() -> int:
    """How many GPUs this process may use. Asking does not reserve memory on them."""
    import torch

    return torch.cuda.device_count()


def training_processes(available: int, batch: int) -> int:
    """The largest number of available processes that divides the global batch equally."""
    return max(count for count in range(1, min(available, batch) + 1) if batch % count == 0)


def micro_batch(batch: int, processes: int, limit: int) -> int:
    """Rows of one forward pass: the most, up to `limit`, that divide a process's share of the global batch."""
    share = batch // processes
    return max(rows for rows in range(1, min(limit, share) + 1) if share % rows == 0)


def engine_kind(hardware: Hardware) -> str:
    """`vllm` or `transformers`: what the profile names; `auto` is vLLM on a GPU where it is installed.

    Raises UserError when the profile names vLLM and it is not installed.
    """
    have_vllm = importlib.util.find_spec("vllm") is not None
    if hardware.engine == "vllm" and not have_vllm:
        raise UserError(
            "hardware.engine: vllm is not installed; `pip install -r requirements-gpu.txt`, or set it to auto"
        )
    if hardware.engine == "auto":
        return "vllm" if have_vllm and visible_gpus() else "transformers"
    return hardware.engine
