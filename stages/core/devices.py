"""How many processes a stage may use, and who starts them."""

from __future__ import annotations

import os
from pathlib import Path

from stages.core.errors import UserError
from stages.core.params import Hardware

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
    """Processes on this host: one for each GPU, unless `hardware.processes` says how many."""
    return max(1, visible_gpus()) if hardware.processes == "auto" else hardware.processes


def visible_gpus() -> int:
    """GPUs this process may use; asking does not take hold of them."""
    import torch

    return torch.cuda.device_count()


def training_processes(available: int, batch: int) -> int:
    """The most of the available processes over which a global batch can be divided equally."""
    return max(count for count in range(1, min(available, batch) + 1) if batch % count == 0)


def micro_batch(batch: int, processes: int, limit: int) -> int:
    """Rows a process takes at once: the most up to `limit` with which accumulation makes the global batch."""
    share = batch // processes
    return max(rows for rows in range(1, min(limit, share) + 1) if share % rows == 0)
