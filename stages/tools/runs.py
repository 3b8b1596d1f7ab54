"""`python -m stages runs`: what ran on this machine, how long it took and how much memory it used."""

from __future__ import annotations

from rich.console import Console

from stages.run.errors import UserError
from stages.run.paths import WORK
from stages.run.stage import last_runs
from stages.tools.show import new_console, new_table


def main(versions: bool = False, console: Console | None = None) -> None:
    """Print the noted runs, oldest first; `versions` adds those of Python and the packages.

    Raises UserError when nothing ran yet.
    """
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
    console = console or new_console()
    console.print(table)
    for run in runs if versions else []:
        found = {"python": run["python"], **run["versions"]}
        words = ", ".join(f"{name} {number}" for name, number in found.items())
        console.print(f"{run['stage']} {run['started']}: {words}", soft_wrap=True)
