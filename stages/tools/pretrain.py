"""`python -m stages pretrain FOLDER`: makes a small base model from nothing, as stages/tiny/base/ was made."""

from __future__ import annotations

import time
from pathlib import Path

from stages.run.errors import UserError
from stages.run.files import atomic_folder
from stages.run.pace import words
from stages.run.process import fix_arithmetic
from stages.tiny.model import pretrain, recorded_settings
from stages.tools.show import new_console

SAID_EVERY = 1000  # problems


def main(folder: Path, record: Path) -> None:
    """Train by the settings in a record into a new folder. Raises UserError when it is there, or for a bad record."""
    if folder.exists():
        raise UserError(f"{folder}: is there already; name a new folder")
    settings = recorded_settings(record)
    console, started = new_console(stderr=True), time.monotonic()
    done = 0

    def advance(count: int, note: str) -> None:
        nonlocal done
        done += count
        if done % SAID_EVERY < count:
            console.print(f"{done:,} of {settings.corpus.problems:,} problems, {note}")

    fix_arithmetic(1, settings.seed)  # one thread, so that sums do not depend on how many there are
    with atomic_folder(folder) as place:
        pretrain(settings, place, advance)
    console.print(f"{folder}: made in {words(time.monotonic() - started)}")
