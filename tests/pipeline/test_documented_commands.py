"""Cheap commands of README.md and docs/ that no other test runs, typed as they stand there, on a copy of the small run.

tests/test_docs_commands.py knows which commands these are. In order: a later one may go by what an earlier one left.
"""

from __future__ import annotations

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
    ("python -m stages runs", "prepare"),
    ("yes | dvc gc --workspace && dvc status", "Data and pipelines are up to date."),
    ("dvc config --local cache.type hardlink,copy", ""),
    ("dvc remote add --local private ../storage && dvc remote default --local private && dvc push", "pushed"),
)


@pytest.fixture(scope="module")
def project(copy_run: Callable[[], Project]) -> Project:
    return copy_run().cold


@pytest.mark.parametrize(("command", "says"), COMMANDS, ids=[command for command, _ in COMMANDS])
def test_it_runs_as_written(command: str, says: str, project: Project) -> None:
    assert says in project.run("bash", "-c", command).stdout


def test_with_hard_links_an_output_takes_its_room_once(project: Project) -> None:
    """What docs/rented-host.md promises of `cache.type hardlink,copy`, set by a command above."""
    project.update("params.yaml", {"regime_w.suspect_from": 0.75})
    project.run("dvc", "repro", "coherence")
    output = project.root / "data/regime_w_rollouts/dpo.jsonl"
    assert any(
        output.samefile(path) for path in Path(project.root, ".dvc/cache").rglob("*") if path.is_file()
    )
