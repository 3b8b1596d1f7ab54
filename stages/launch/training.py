"""Trains in one process for each device: the same function in all of them, on this host or on a Ray cluster.

    train_everywhere("stages.sft:train", run, batch=16)

With one device the function is called in this process. With several, each gets a process of its own in torch's
distributed environment (RANK, WORLD_SIZE, ...), which accelerate and the trainers read. When a process runs out of
memory, training starts again at the newest complete checkpoint, first with gradient checkpointing, then with half the
rows.
"""

from __future__ import annotations

from stages.launch.attempt import ROWS, call
from stages.launch.devices import host_processes, launcher, training_processes, visible_gpus
from stages.launch.local import train_in_processes
from stages.launch.ray_training import train_on_ray
from stages.run.errors import UserError
from stages.run.files import read_json
from stages.run.stage import StageRun
from stages.run.trackers import named_trackers


def train_everywhere(entry: str, run: StageRun, batch: int) -> None:
    """Call `entry` ("module:function") in as many processes as divide the global batch.

    The function takes the run and the most rows of one forward pass (None: as many as fit). Raises UserError when not
    even one row fits into memory, when a process fails, or when LOOPER_TRACKERS names what is not there.
    """
    named_trackers()
    most: int | None = None
    note = run.work / ROWS
    note.unlink(missing_ok=True)
    while not _attempt(entry, run, batch, most):
        if not note.is_file():
            raise UserError(
                f"{run.name}: the model does not fit into memory; `python -m stages check` says how much it needs"
            )
        most = _fewer_rows(run, **read_json(note))


def _attempt(entry: str, run: StageRun, batch: int, most: int | None) -> bool:
    """Train once. Returns False when a process ran out of memory."""
    if launcher() == "ray":
        return train_on_ray(entry, run, batch, most)
    available = host_processes(run.params.hardware)
    count = training_processes(available, batch)
    if count < available:
        run.say(f"training on {count} of {available} devices, because a batch of {batch} divides by {count}")
    # A single process that sees several GPUs would split its rows among them, so it gets a process of its own too.
    if count > 1 or visible_gpus() > 1:
        return train_in_processes(entry, run, count, most)
    return call(entry, run, most)


def _fewer_rows(run: StageRun, rows: int, checkpointing: bool) -> int:
    """The rows of the next attempt after `rows` did not fit. Raises UserError when nothing is left to try."""
    if not checkpointing and run.params.hardware.gradient_checkpointing == "auto":
        run.say(f"out of memory with {rows} rows; trying again with gradient checkpointing")
        return rows
    if rows == 1:
        advice = "lower max_tokens" if checkpointing else "set hardware.gradient_checkpointing: auto"
        raise UserError(f"{run.name}: out of memory with a single row; {advice}")
    run.say(f"out of memory with {rows} rows; trying again with {rows // 2}")
    return rows // 2
