"""Ends a stage in order when DVC is gone, on SIGTERM, and on a full disk: it leaves no orphan and no traceback."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import psutil

from stages.run.errors import UserError

GRACE = 30.0  # seconds that a stage has to end in order once its parent is gone
ROOM = 1 << 20  # with fewer free bytes than this a disk counts as full
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def end_with_parent() -> None:
    """End this process when the DVC that started it is gone, so that no orphan writes to its outputs.

    A stage started by hand (there is no DVC_STAGE in the environment) goes on, as `nohup` promises.
    """
    if "DVC_STAGE" not in os.environ:
        return
    parent = os.getppid()
    # If a shell stands between DVC and the stage, it lives on when DVC is killed. Then watch DVC as well.
    above, words = _look_at(parent)
    starter = above if words and words[0].endswith("sh") else None  # sh, bash, zsh, ...
    # If DVC was killed while this stage was starting, the parent is now process 1, which is not DVC.
    if 1 in (parent, starter) and not any("dvc" in word for word in _look_at(1)[1]):
        raise SystemExit(143)
    end_with(parent, starter)


def end_with(parent: int, starter: int | None = None) -> None:
    """End this process when its parent process ends, or the parent's own `starter` if given."""

    def watch() -> None:
        while os.getppid() == parent and (starter is None or _look_at(parent)[0] == starter):
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(143)

    threading.Thread(target=watch, daemon=True).start()


def _look_at(pid: int) -> tuple[int | None, list[str]]:
    """The parent of a process, and its command line; neither once it has ended."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return process.ppid(), process.cmdline()
    return None, []


def leave_on_sigterm() -> None:
    """From now on, turn SIGTERM into an ordinary exit, which closes journals and removes temporary files."""

    def leave(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, leave)


@contextlib.contextmanager
def name_full_disk(label: str, folder: Path) -> Iterator[None]:
    """Turn any error that a full disk causes, in whatever library, into a one-line UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        known = isinstance(error, OSError) and error.errno in NO_ROOM
        # torch and safetensors raise errors of their own, which may not name the reason.
        if known or "No space left" in str(error) or shutil.disk_usage(folder).free < ROOM:
            raise UserError(
                f"{label}: the disk is full ({folder.resolve()} or the output's folder); free some room and run "
                "the same command again: it goes on where it was"
            ) from error
        raise
