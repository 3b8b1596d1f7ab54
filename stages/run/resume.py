"""The checkpoints of a training: marks the complete ones, and finds the one from which an interrupted run goes on."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from stages.run.files import sync_files

TRAINER = "trainer"  # folder of the checkpoints, in the run's work folder
COMPLETE = "complete"  # file written into a checkpoint once all of it is on the disk


def mark_complete(checkpoint: Path) -> None:
    """Mark a checkpoint as complete, after all its files are safe on the disk."""
    sync_files(checkpoint)
    (checkpoint / COMPLETE).touch()


def newest_checkpoint(work: Path) -> Path | None:
    """The newest complete checkpoint of an interrupted run; the first process removes all others.

    Older complete ones go too. The trainer keeps the two checkpoints with the youngest time of change, and a kill
    while it was deleting an old one makes that one young.
    """
    found = list((work / TRAINER).glob("checkpoint-*"))
    newest = max((folder for folder in found if (folder / COMPLETE).is_file()), key=step_of, default=None)
    for folder in found:
        if folder != newest and os.environ.get("RANK", "0") == "0":
            shutil.rmtree(folder)
    return newest


def step_of(checkpoint: Path | None) -> int:
    """The optimizer step at which a checkpoint folder was written; 0 for none."""
    return int(checkpoint.name.split("-")[1]) if checkpoint else 0
