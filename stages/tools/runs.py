"""`python -m stages runs`: what ran on this machine, how long it took and how much memory it used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.core.errors import UserError
from stages.core.stage import WORK, last_runs

if TYPE_CHECKING:
    from rich.console import Console


def main(versions: bool = False, console: Console | None = None) -> None:
    """Print the noted runs, oldest first; `versions` adds those of Python and the packages.

    Raises UserError when nothing ran yet.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    runs = last_runs()
    if not runs:
        raise UserError(f"{WORK}/runs: no stage has run on this machine yet; run `dvc repro`")
    table = Table(box=SIMPLE_HEAD)
    for name in ("stage", "started (UTC)", "seconds", "memory MiB", "revision"):
        table.add_column(name, justify="right" if name in ("seconds", "memory MiB") else "left", no_wrap=True)
    for run in runs:
        cells = [
            run["stage"],
            run["started"].replace("T", " ").removesuffix("Z"),
            f"{run['seconds']:,.1f}",
            f"{run['peak_memory_mib']:,}",
            (run["revision"] or "")[:7],
        ]
        table.add_row(*map(escape, cells))
    console = console or Console()
    console.print(table)
    for run in runs if versions else []:
        found = {"python": run["python"], **run["versions"]}
        words = ", ".join(f"{name} {number}" for name, number in found.items())
        console.print(
            f"{run['stage']} {run['started']}: {words}", markup=False, highlight=False, soft_wrap=True
        )
