"""Training in one process for each device: the same function in all of them, on one host or on a cluster.

    train_everywhere("stages.sft:train", run, batch=16)

With one device the function is called in this process. With several, each gets a process of its own and torch's
distributed environment (RANK, WORLD_SIZE, ...), from which accelerate and the trainers take the rest. Under the
ray launcher Ray Train starts the same function on the hosts of the cluster. A process that runs out of memory
computes activations again or halves the rows taken at once, and training goes on from the newest complete
checkpoint.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from stages.core.devices import host_processes, launcher, training_processes, visible_gpus
from stages.core.errors import UserError
from stages.core.guard import end_with
from stages.core.launch import prepare_process
from stages.core.params import Sections, load_params
from stages.core.records import read_json, write_json
from stages.core.stage import StageRun

OUT_OF_MEMORY = 75  # the exit status of a training process for which its rows were too many
ROWS = "rows_at_once.json"


def train_everywhere(entry: str, run: StageRun, batch: int) -> None:
    """Call `entry` ("module:function", taking the run) in as many processes as divide the global batch.

    Raises UserError when one row at a time does not fit into memory, or when a process fails.
    """
    limit: int | None = None
    note = run.work / ROWS
    note.unlink(missing_ok=True)
    while not _attempt(entry, run, batch, limit):
        if not note.is_file():
            raise UserError(
                f"{run.name}: the model does not fit into memory; `python -m stages check` says more"
            )
        used = read_json(note)
        limit = _fewer_rows(run, used["rows"], used["checkpointing"])


def _fewer_rows(run: StageRun, rows: int, checkpointing: bool) -> int:
    """How many rows to go on with after memory ran out; says so. Raises UserError when nothing is left to try."""
    if not checkpointing and run.params.hardware.gradient_checkpointing == "auto":
        run.say(f"out of memory with {rows} rows at once; going on with activations computed again")
        return rows
    if rows == 1:
        advice = "lower max_tokens" if checkpointing else "set hardware.gradient_checkpointing: auto"
        raise UserError(f"{run.name}: out of memory with one row at a time; {advice}")
    run.say(f"out of memory with {rows} rows at once; going on with {rows // 2}")
    return rows // 2


def note_rows(run: StageRun, rows: int, checkpointing: bool) -> None:
    """Remember how many rows a process takes at once, and how, for whoever starts it again."""
    if os.environ.get("RANK", "0") == "0":
        write_json(run.work / ROWS, {"rows": rows, "checkpointing": checkpointing})


def _attempt(entry: str, run: StageRun, batch: int, limit: int | None) -> bool:
    """Whether training got to its end; False when memory ran out."""
    if launcher() == "ray":
        from stages.core.ray_training import train_on_ray

        return train_on_ray(entry, run, batch, limit)
    available = host_processes(run.params.hardware)
    count = training_processes(available, batch)
    if count < available:
        run.say(f"training on {count} of {available} devices, over which a batch of {batch} divides")
    if (
        count > 1 or visible_gpus() > 1
    ):  # alone with several GPUs, the trainer would split its rows among them
        return _in_processes(entry, run, count, limit)
    return call(entry, run, limit)


def call(entry: str, run: StageRun, limit: int | None) -> bool:
    """Call the function here; False when memory ran out."""
    import torch

    module, _, name = entry.partition(":")
    run.rows_limit = limit
    try:
        getattr(importlib.import_module(module), name)(run)
    except torch.OutOfMemoryError:
        pass
    else:
        return True
    gc.collect()  # the model of the failed attempt
    torch.cuda.empty_cache()
    return False


def _in_processes(entry: str, run: StageRun, count: int, limit: int | None) -> bool:
    order = json.dumps({"entry": entry, "limit": limit, **run.description()})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(count):
        environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        environment |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-m", "stages.core.processes", order]
        processes.append(subprocess.Popen(command, env=environment))
    try:
        while None in (states := [process.poll() for process in processes]):  # all: a later one may end first
            if any(states):
                time.sleep(1)  # another one may be about to say that it ran out of memory
                break
            time.sleep(0.2)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
        codes = [process.wait() for process in processes]
    if OUT_OF_MEMORY in codes:
        return False
    if any(codes):
        rank = next(rank for rank, code in enumerate(codes) if code)
        raise UserError(
            f"{run.name}: training process {rank} of {count} ended with status {codes[rank]}; what it said is "
            "above. Run the same command again: it goes on from the newest checkpoint"
        )
    return True


def rebuild(order: dict[str, Any]) -> StageRun:
    """The run that `StageRun.description` describes, in another process; only rank 0 shows anything."""
    from rich.console import Console

    quiet = os.environ.get("RANK", "0") != "0"
    params = Sections(load_params(), tuple(order["sections"]))
    return StageRun(
        order["name"], params, Path(order["work"]), Console(stderr=True, soft_wrap=True, quiet=quiet)
    )


def main() -> None:
    """A training process started by `_in_processes`."""
    end_with(os.getppid())
    prepare_process()
    order = json.loads(sys.argv[1])
    try:
        finished = call(order["entry"], rebuild(order), order["limit"])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0 if finished else OUT_OF_MEMORY)


if __name__ == "__main__":
    main()
