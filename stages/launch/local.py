"""Trains in several processes of this host, one for each device, started by torch.multiprocessing."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from typing import Any

from torch.multiprocessing import ProcessExitedException, start_processes

from stages.launch.attempt import END, call_as_one_of_several, order_for, out_of_memory, rebuild
from stages.run.errors import UserError
from stages.run.guard import end_with
from stages.run.process import prepare_process
from stages.run.stage import StageRun


def train_in_processes(entry: str, run: StageRun, count: int, most: int | None) -> bool:
    """Call `entry` in `count` processes. Returns False when one of them ran out of memory.

    Raises UserError when a process fails otherwise.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]  # a free one
    order = {**order_for(entry, run, most), "port": port, "count": count, "parent": os.getpid()}
    context = start_processes(work, (order,), count, join=False, start_method="spawn")
    try:
        while not context.join():
            pass
    except ProcessExitedException as error:
        if out_of_memory(run):
            return False
        raise UserError(
            f"{run.name}: training process {error.error_index} of {count} ended with status {error.exit_code}; what "
            "it said is above. Run the same command again: it goes on from the newest checkpoint"
        ) from None
    finally:
        for process in context.processes:
            process.kill()
            process.join()
    return True


def work(rank: int, order: dict[str, Any]) -> None:
    """The work of one process."""
    end_with(order["parent"])
    for name in ("", "LOCAL_"):
        os.environ |= {f"{name}RANK": str(rank), f"{name}WORLD_SIZE": str(order["count"])}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(order["port"])}
    prepare_process()
    run = rebuild(order)
    try:
        finished = call_as_one_of_several(order, run)
    except Exception:
        # If another process has ended, this one has only lost its connection, which is no news.
        if not (run.work / END).is_file():
            traceback.print_exc()
        sys.exit(1)
    if not finished:
        os._exit(1)  # at once: an orderly exit could wait for the other processes
