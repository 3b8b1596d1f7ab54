"""Every shell script of the project passes shellcheck and can be run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def shell_scripts() -> list[str]:
    """Tracked files that a shell runs, by their name or their first line."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=REPO, capture_output=True, text=True, check=True
    )
    found = []
    for name in listed.stdout.splitlines():
        file = REPO / name
        if name.endswith((".sh", ".bash")):
            found.append(name)
        elif file.is_file() and not file.suffix:
            with file.open("rb") as text:
                first = text.readline(80)
            if first.startswith(b"#!") and first.rstrip().endswith(b"sh"):
                found.append(name)
    return found


def test_shell_scripts_pass_shellcheck() -> None:
    scripts = shell_scripts()
    assert {".ci/run", "scripts/host.sh"} <= set(scripts)
    own = Path(sys.executable).parent / "shellcheck"
    checker = str(own) if own.exists() else shutil.which("shellcheck")
    assert checker, "shellcheck is in requirements-dev.txt; install that"
    done = subprocess.run([checker, *scripts], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in scripts:
        assert os.access(REPO / name, os.X_OK), f"{name} cannot be run: chmod +x"


def test_the_replit_workspace_runs_the_first_of_the_two_commands() -> None:
    """The Run button does what the README says, and pip may install into .venv there."""
    settings = tomllib.loads((REPO / ".replit").read_text(encoding="utf-8"))
    assert settings["run"] == ["make"]
    assert settings["modules"] == ["python-3.11"]
    assert "gnumake" in settings["nix"]["packages"]
    assert settings["env"]["PIP_USER"] == "0"  # Replit's own setting keeps pip out of environments
