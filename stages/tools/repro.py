"""`python -m stages repro`, which `make` runs: `dvc repro` with the time left, then the result table.

At the end one line says whether the outputs are, byte for byte, those of the committed run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from stages.page.table import print_results
from stages.run.errors import UserError
from stages.run.history import parse_lock, read_lock
from stages.run.pace import announce, words
from stages.run.params import load_params
from stages.run.paths import LOCK
from stages.tools.plan import make_plan
from stages.tools.show import new_console

PRODUCED = ("data/", "checkpoints/", "metrics/", "report")


def main() -> None:
    """Run what is out of date, print the result table, and compare the outputs with the committed ones.

    Raises UserError when a stage fails; its own message stands above.
    """
    console = new_console()
    plan = make_plan()
    typical = load_params().hardware.seconds
    stages = sorted([*plan["will_run"], *plan["may_follow"]], key=lambda one: one.place)
    if stages:
        seconds = {one.stage: one.last["seconds"] if one.last else typical.get(one.stage) for one in stages}
        known = {name: took for name, took in seconds.items() if took is not None}
        guess = (
            f", about {words(sum(known.values()))} on two idle cores" if len(known) == len(seconds) else ""
        )
        console.print(f"{len(stages)} stages to run{guess}")
        environment = announce(known if guess else {})
        command = [sys.executable, "-m", "dvc", "repro", "--quiet"]
        if status := wait_for(subprocess.Popen(command, env=os.environ | environment)):
            raise UserError(f"dvc repro ended with status {status}; what the stage said is above")
    print_results()
    if line := committed_line():
        console.print(f"\n{line}", soft_wrap=True)


def wait_for(process: subprocess.Popen[bytes]) -> int:
    """The exit status of DVC. Ctrl-C reaches it too, and it gets the time that it needs to end in order."""
    stopped = False
    while True:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            stopped = True
            continue
        if stopped:
            raise KeyboardInterrupt
        return status


def committed_line() -> str:
    """Whether this run's outputs are those of the committed dvc.lock; nothing where that cannot be compared."""
    try:
        done = subprocess.run(["git", "show", f"HEAD:./{LOCK}"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or no commit that has the file
        return ""
    committed, here = parse_lock(done.stdout), read_lock()
    asked = {name: _asked(entry) for name, entry in here.items()}
    if asked != {name: _asked(entry) for name, entry in committed.items()}:
        return "Parameters, code or data are not those of the committed run, so its outputs are not compared."
    other = [name for name, entry in here.items() if entry.get("outs") != committed[name].get("outs")]
    if not other:
        return "Same bytes: every output is, byte for byte, that of the committed run."
    return (
        f"Other bytes than the committed run, from {other[0]} on. Parameters and code are the same, so it is how this "
        "processor rounds,\nand the table is as good as the committed one. `git checkout -- .` brings the committed "
        "metrics back."
    )


def _asked(entry: dict[str, Any]) -> tuple[Any, ...]:
    """What a stage was asked to do: its command, its parameters, and what no other stage wrote."""
    given = [one for one in entry.get("deps", []) if not one["path"].startswith(PRODUCED)]
    return entry["cmd"], entry.get("params"), given
