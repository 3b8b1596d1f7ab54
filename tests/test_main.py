"""The command line's own words."""

from __future__ import annotations

import subprocess
import sys

import pytest

from stages.engine.ray_engine import _say


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
