"""Cheap commands of README.md and docs/ that no other test runs, typed as they stand there, on a copy of the small run.

tests/test_docs_commands.py knows which commands these are. In order: a later one may go by what an earlier one left.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.pipeline.conftest import Project

pytestmark = pytest.mark.pipeline

# Command, and what it must print.
COMMANDS = (
    ("python -m stages pairs --kind coherence --sample 1", "1 of 1"),
    ("python -m stages suspects", "questions have a suspicion of"),
    ("dvc repro -f prepare && dvc repro", "Data and pipelines are up to date."),
    ("yes | dvc gc --workspace && dvc status", "Data and pipelines are up to date."),
    ("dvc config --local cache.type hardlink,copy", ""),
    ("dvc remote add --local private ../storage && dvc remote default --local private && dvc push", "pushed"),
)


@pytest.fixture(scope="module")
def project(copy_run: Callable[[], Project]) -> Project:
    return copy_run()


@pytest.mark.parametrize(("command", "says"), COMMANDS, ids=[command for command, _ in COMMANDS])
def test_it_runs_as_written(command: str, says: str, project: Project) -> None:
    assert says in project.run("bash", "-c", command).stdout


@pytest.mark.skipif(not shutil.which("tmux"), reason="tmux is not installed")
def test_the_host_script_runs_the_real_pipeline(copy_run: Callable[[], Project]) -> None:
    """`dvc repro` in tmux, from a changed parameter to its end; with hard links, outputs take room once."""
    project = copy_run()
    (project.root / ".venv").symlink_to(sys.prefix)
    project.run("dvc", "config", "--local", "cache.type", "hardlink,copy")
    project.update("params.yaml", {"regime_w.suspect_from": 0.75})
    sockets = project.root.parent / "t"
    sockets.mkdir()
    env = {"TMUX_TMPDIR": os.path.relpath(sockets, project.root)}  # a socket's path must be short
    project.run("scripts/host.sh", "start", "--", "coherence", **env)
    for _ in range(1200):
        said = project.run("scripts/host.sh", "status", check=False, **env).stdout
        if not said.startswith("running"):
            break
        time.sleep(0.1)
    assert said.startswith("finished well"), said
    assert "Running stage 'coherence':" in (project.root / ".work/host/log").read_text()
    scored = project.root / "data/regime_w_rollouts.jsonl"
    cached = [path for path in Path(project.root, ".dvc/cache").rglob("*") if path.is_file()]
    assert [path for path in cached if path.samefile(scored)]
