"""Looks at other processes under /proc, so that tests of kills can choose the moment."""

from __future__ import annotations

import contextlib
from pathlib import Path


def holds(pid: int, path: Path) -> bool:
    """Whether a process has a file open."""
    try:
        return any(link.readlink() == path for link in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:  # it ended, or closed one in between
        return False


def owner_of(path: Path) -> int | None:
    """The process that has a file open."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and holds(int(folder.name), path.resolve()):
            return int(folder.name)
    return None


def children(pid: int) -> list[int]:
    """The direct children of a process (none once it has ended)."""
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def arguments(pid: int) -> list[str]:
    """A process's command line (one empty word once it has ended)."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    return [""]
