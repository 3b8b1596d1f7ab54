"""How a stage ends when it must: with DVC, on SIGTERM, on a full disk. Never as an orphan, never by a traceback."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from stages.core.errors import UserError

GRACE = 30.0  # seconds a stage has to leave in order once its parent is gone
ROOM = 1 << 20  # a disk with less free bytes than this is full
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def end_with_parent() -> None:
    """Make this process end when DVC, which started it, is gone, so that no orphan writes on.

    A stage started by hand (no DVC_STAGE in the environment) goes on, as `nohup` promises.
    """
    if "DVC_STAGE" not in os.environ:
        return
    parent = os.getppid()
    # A shell that stays between DVC and the stage would live on when DVC is killed: then DVC is watched too.
    starter = _parent_of(parent) if _is_shell(parent) else None
    # Killed while this stage was still starting, DVC has left it to process 1, which is no DVC.
    if 1 in (parent, starter) and not any(b"dvc" in argument for argument in _arguments(1)):
        raise SystemExit(143)
    end_with(parent, starter)


def end_with(parent: int, starter: int | None = None) -> None:
    """Make this process end with its parent process, and with the one that started that, if given."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: at once, but by the direct parent only
    threading.Thread(target=_watch, args=(parent, starter), daemon=True).start()


def _watch(parent: int, starter: int | None) -> None:
    while os.getppid() == parent and (starter is None or _parent_of(parent) == starter):
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(143)


def _is_shell(pid: int) -> bool:
    arguments = _arguments(pid)
    return bool(arguments) and arguments[0].endswith(b"sh")  # sh, bash, zsh, ...


def _arguments(pid: int) -> list[bytes]:
    with contextlib.suppress(OSError):  # no /proc on this system, or the process is gone
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return []


def _parent_of(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
        return int(after_name.split()[1])
    return None


@contextlib.contextmanager
def leave_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into an ordinary exit, so that journals are closed and temporary files removed."""

    def leave(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def name_full_disk(label: str, folder: Path) -> Iterator[None]:
    """Say in one line (UserError) that the disk is full, whichever library found out and however it put it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        known = isinstance(error, OSError) and error.errno in NO_ROOM
        # torch and safetensors raise errors of their own, in whose text the reason may be missing.
        if known or "No space left" in str(error) or shutil.disk_usage(folder).free < ROOM:
            raise UserError(
                f"{label}: the disk is full ({folder.resolve()} or the output's folder); free some room and run "
                "the same command again: it goes on where it was"
            ) from error
        raise
