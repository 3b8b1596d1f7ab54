"""The command line's own words."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stages.engine.ray_engine import _say

REPO = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("tool", "defaults"),
    [
        ("grade", ["question", "id"]),
        ("ask", ["the evaluation's"]),
        ("suspects", ["regime_w.suspect_from"]),
    ],
)
def test_help_names_the_defaults_that_are_found_later(tool: str, defaults: list[str]) -> None:
    """In square brackets, which the library that prints them would take for markup."""
    command = [sys.executable, "-m", "stages", tool, "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    words = " ".join(shown.replace("│", " ").split())
    for default in defaults:
        assert f"[default: {default}]" in words


def test_what_ray_says_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """An error's text may hold what looks like markup, even such as would be an error itself."""
    _say("a worker is gone (Error: [/] in [bold]x[0])")
    assert "a worker is gone (Error: [/] in [bold]x[0])" in capsys.readouterr().err


def test_a_python_without_the_packages_hands_over_to_the_environment(tmp_path: Path) -> None:
    """As when DVC runs the first python3 of the PATH and `.venv` was not activated; `-S` hides all packages."""
    shutil.copytree(REPO / "stages", tmp_path / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-S", "-m", "stages", "runs"]
    alone = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert alone.returncode == 1
    assert alone.stderr.startswith("error: ") and "type `make`" in alone.stderr
    assert len(alone.stderr.splitlines()) == 1
    own = tmp_path / ".venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.write_text('#!/bin/sh\necho "$@"\n')
    own.chmod(0o755)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "-m stages runs\n"
