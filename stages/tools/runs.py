"""`python -m stages runs`: what ran on this machine, how long it took, and the memory of its largest process."""

from __future__ import annotations

from stages.run.errors import UserError
from stages.run.paths import WORK
from stages.run.stage import last_runs
from stages.tools.show import new_console, new_table


def main() -> None:
    """Print the noted runs, oldest first. Raises UserError when nothing ran yet."""
    runs = last_runs()
    if not runs:
        raise UserError(f"{WORK}/runs: no stage has run on this machine yet; run `dvc repro`")
    table = new_table(
        "stage", "started (UTC)", "seconds", "memory MiB", "revision", right=("seconds", "memory MiB")
    )
    for run in runs:
        started = run["started"].replace("T", " ").removesuffix("Z")
        seconds, memory = f"{run['seconds']:,.1f}", f"{run['peak_memory_mib']:,}"
        table.add_row(run["stage"], started, seconds, memory, (run["revision"] or "")[:7])
    new_console().print(table)
