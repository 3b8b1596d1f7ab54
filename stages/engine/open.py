"""Opens the engine that a stage generates with, on all devices there are.

with open_engine(adapter, hardware) as engine:
    for completion in engine.generate(requests): ...
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from stages.engine.load import load_engine
from stages.engine.ray_engine import RayEngine
from stages.engine.workers import WorkersEngine
from stages.launch.devices import engine_kind, host_processes, launcher, visible_gpus
from stages.launch.ray_cluster import ray_cluster
from stages.policy.request import Engine, EngineStartError
from stages.run.errors import UserError
from stages.run.params import Hardware


@contextlib.contextmanager
def open_engine(adapter: Path | None, hardware: Hardware) -> Iterator[Engine]:
    """An engine for the base model with `adapter` (or none), closed when the block ends.

    One device: it runs in this process. Several: one process for each. Under the ray launcher: one actor for each
    device of the cluster. Raises UserError when the engine that the profile names is not installed or does not start.
    """
    if launcher() == "ray":
        with ray_cluster() as ray, RayEngine(ray, adapter, hardware) as ray_engine:
            yield ray_engine
    elif (count := host_processes(hardware)) > 1:
        _name_plain_batches(hardware)
        with WorkersEngine(adapter, hardware, count) as workers:
            yield workers
    else:
        _name_plain_batches(hardware)
        try:
            engine = load_engine(adapter, hardware)
        except EngineStartError as error:
            raise UserError(f"generation: {error}") from error
        yield engine


def _name_plain_batches(hardware: Hardware) -> None:
    """Say so when a GPU has to do without vLLM although nobody chose that."""
    if hardware.engine == "auto" and visible_gpus() and engine_kind(hardware) == "transformers":
        Console(stderr=True, soft_wrap=True).print(
            "generation: vLLM is not installed, so the GPU computes plain batches, which take about four times as long "
            "(an estimate; python bench/gpu.py measures it). To install it: pip install -r requirements-gpu.txt",
            highlight=False,
        )
