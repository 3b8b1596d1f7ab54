"""What each training process does, whoever started it: run the stage's function, and note why it could not finish."""

from __future__ import annotations

import gc
import importlib
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console

from stages.launch.devices import micro_batch
from stages.launch.memory import training_rows
from stages.policy.context import context_size
from stages.run.errors import UserError
from stages.run.files import read_json, write_json
from stages.run.params import Dpo, Sections, Sft, load_params
from stages.run.shortage import ran_out_of_memory
from stages.run.stage import StageRun
from stages.train.trainer import Rows

# How long a process may wait for another one: while a policy trains, each answers its share of the validation problems.
PATIENCE = timedelta(hours=2)
# Files in the run's folder
ROWS = "rows.json"  # how the last attempt went through its batches
END = "end.json"  # why one of several processes did not finish: {"out_of_memory": true} or {"error": "..."}


def fit_rows(run: StageRun, spec: Sft | Dpo, model: Any, longest: int, most: int | None) -> Rows:
    """The rows that fit into the memory of every process, for rows of at most `longest` tokens.

    The global batch stays what the parameters say. Raises UserError when the model's memory cannot be estimated, or
    when a row is longer than its context.
    """
    if (context := context_size(model.config)) and longest > context:
        key = f"{run.name.partition('@')[0]}.max_tokens"
        raise UserError(
            f"{key}: the longest row has {longest:,} tokens, and the model's context is {context:,}; "
            f"lower {key} to that"
        )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    limit, checkpointing = training_rows(model, spec, run.params.hardware, longest, processes, most)
    if processes > 1:
        # Joins the other processes. The first one to ask sets the time limit, and the trainer asks later.
        PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        everyone = gather_object([(limit, checkpointing)])
        limit = min(rows for rows, _ in everyone)  # accumulation must be the same in all of them
        checkpointing = any(on for _, on in everyone)
    micro = micro_batch(spec.batch, processes, limit)
    if os.environ.get("RANK", "0") == "0":
        write_json(run.work / ROWS, {"rows": micro, "checkpointing": checkpointing})
    return Rows(micro, spec.batch // (micro * processes), checkpointing)


def call(entry: str, run: StageRun, most: int | None) -> bool:
    """Call the function `entry` ("module:function") in this process. Returns False when memory ran out."""
    module, _, name = entry.partition(":")
    try:
        getattr(importlib.import_module(module), name)(run, most)
        return True
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
    gc.collect()  # frees the model of the failed attempt
    torch.cuda.empty_cache()
    return False


def order_for(entry: str, run: StageRun, most: int | None) -> dict[str, Any]:
    """What another process must be told to take part in an attempt. Forgets how an earlier attempt ended."""
    (run.work / END).unlink(missing_ok=True)
    described = {
        "name": run.name,
        "work": str(run.work),
        "sections": run.params.declared,
        "started": run.started,
    }
    return {"entry": entry, "most": most, **described}


def call_as_one_of_several(order: dict[str, Any], run: StageRun) -> bool:
    """As `call`, and a UserError returns False too. The reason is noted for `out_of_memory`."""
    try:
        if call(order["entry"], run, order["most"]):
            return True
        write_json(run.work / END, {"out_of_memory": True})
    except UserError as error:
        write_json(run.work / END, {"error": str(error)})
    return False


def out_of_memory(run: StageRun) -> bool:
    """Whether a process noted that its memory ran out. Raises the UserError that a process noted."""
    ended = read_json(run.work / END) if (run.work / END).is_file() else {}
    if "error" in ended:
        raise UserError(ended["error"])
    return "out_of_memory" in ended


def rebuild(order: dict[str, Any]) -> StageRun:
    """The run of an order, in another process; only rank 0 shows progress."""
    quiet = os.environ.get("RANK", "0") != "0"
    params = Sections(load_params(), tuple(order["sections"]), order["name"].partition("@")[2])
    console = Console(stderr=True, soft_wrap=True, quiet=quiet)
    return StageRun(order["name"], params, Path(order["work"]), console, started=order["started"])
