"""Trains on a Ray cluster by Ray Train: the same function on as many devices as divide the global batch.

Ray Train's TorchTrainer starts the processes and connects them (gloo on CPUs, nccl on GPUs). When a process dies, this
module ends the others and trains again on the devices that are left, from the newest complete checkpoint in the run's
folder. So the project must lie in a folder that all hosts share. Ray Train's own `max_failures` does not serve here: it
waits for as many devices as before, and those of a dead host may never come back.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from stages.launch.attempt import PATIENCE, call_as_one_of_several, order_for, out_of_memory, rebuild
from stages.launch.devices import training_processes
from stages.launch.ray_cluster import WAIT_SECONDS, last_line, ray_cluster, usable_places
from stages.run.errors import UserError
from stages.run.files import write_json
from stages.run.resume import newest_checkpoint, step_of
from stages.run.stage import StageRun

RESTARTS = 3  # in a row without a new checkpoint
SAID = "said.log"  # what the first worker prints
TOKEN = "token.json"  # a file by which a host proves that it shares the folder


def train_on_ray(entry: str, run: StageRun, batch: int, most: int | None) -> bool:
    """Call `entry` on the workers of the cluster. Returns False when one of them ran out of memory.

    Raises UserError when the cluster cannot be used, or when training dies repeatedly without a new checkpoint.
    """
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")  # a large model's host may be slow
    with ray_cluster() as ray, _following(run):
        failures, step = 0, step_of(newest_checkpoint(run.work))
        while True:
            count, resources = _choose_workers(ray, run, batch)
            error = _fit(entry, run, count, resources, most)
            if error is None:
                return True
            if out_of_memory(run):
                return False
            before, step = step, step_of(newest_checkpoint(run.work))
            failures = 1 if step > before else failures + 1
            if failures > RESTARTS:
                raise UserError(
                    f"{run.name}: training on the Ray cluster ended {failures} times without a new checkpoint (the "
                    f"last: {error}). Run the same command again: it goes on from step {step}"
                )
            run.say(f"a worker is gone ({escape(error)}); going on from step {step}")


def _choose_workers(ray: Any, run: StageRun, batch: int) -> tuple[int, dict[str, float]]:
    """The number of workers, and the CPUs and GPUs that each of them reserves."""
    write_json(run.work / TOKEN, {"time": time.time()})  # only hosts that share this folder have it
    deadline = time.monotonic() + WAIT_SECONDS
    known: dict[str, str] = {}
    while True:
        places = usable_places(ray, run.params.hardware, [run.work / TOKEN], known)
        if problem := next(filter(None, known.values()), None):
            raise UserError(f"{run.name}: {problem}")
        if places:
            break
        if time.monotonic() > deadline:
            raise UserError(
                f"{run.name}: the Ray cluster has had no device for {WAIT_SECONDS / 60:.0f} minutes; start workers "
                "with `ray start` (docs/gpus.md) and run the same command again: it goes on where it was"
            )
        time.sleep(2)
    count = training_processes(len(places), batch)
    run.say(f"training with {count} workers; the Ray cluster has {len(places)} devices")
    resources: dict[str, float] = {"CPU": min(place.cpus for place in places)}
    if places[0].gpus:
        resources["GPU"] = 1
    return count, resources


def _fit(entry: str, run: StageRun, count: int, resources: dict[str, float], most: int | None) -> str | None:
    """Train to the end (returns None) or until a worker dies (returns the reason, in one line)."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer = TorchTrainer(
        work,
        train_loop_config={**order_for(entry, run, most), "project": str(Path.cwd())},
        torch_config=TorchConfig(timeout_s=int(PATIENCE.total_seconds())),
        scaling_config=ScalingConfig(
            num_workers=count, use_gpu="GPU" in resources, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=f"{run.name}-{time.time_ns()}",  # a new name, so that Ray Train restores nothing
            storage_path=str(run.work.resolve() / "ray"),
            failure_config=FailureConfig(max_failures=0),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        failures = getattr(error, "worker_failures", None) or {0: error}
        return last_line(next(iter(failures.values())))
    return None


def work(order: dict[str, Any]) -> None:
    """The work of each worker. Ray Train has already set RANK and WORLD_SIZE and connected the processes."""
    os.chdir(order["project"])
    run = rebuild(order)
    with (run.work / SAID).open("a", encoding="utf-8") as said:
        if os.environ["RANK"] == "0":
            run.console = Console(file=said, soft_wrap=True)
        if not call_as_one_of_several(order, run):
            raise RuntimeError("training did not finish")  # ends the other workers too


@contextlib.contextmanager
def _following(run: StageRun) -> Iterator[None]:
    """Print here what the first worker writes into the run's folder."""
    path, over = run.work / SAID, threading.Event()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")

    def follow() -> None:
        with path.open(encoding="utf-8") as said:
            while True:
                last = over.wait(0.5)
                if text := said.read():
                    run.console.print(text, end="", markup=False, highlight=False)
                if last:
                    return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
