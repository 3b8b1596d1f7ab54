"""Copies of the working tree in which a bench may run pipelines with other parameters."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]


def copy_project(place: Path) -> None:
    """Copy what git tracks or would track to `place`, without results, as a repository of its own."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and name != "dvc.lock" and not name.startswith("metrics/"):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)
    subprocess.run(["git", "init", "-q"], cwd=place, check=True)


def change(path: Path, assignments: list[str]) -> None:
    """Set `a.b=value` keys of a YAML file; a key that is not there is an error."""
    yaml = YAML()
    tree = yaml.load(path.read_text())
    for assignment in assignments:
        key, _, value = assignment.partition("=")
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        if last not in node:
            raise SystemExit(f"{path}: there is no key {key}")
        node[last] = yaml.load(value)
    with path.open("w") as file:
        yaml.dump(tree, file)


def call(place: Path, *command: str) -> None:
    """Run a command of this environment (`dvc`, `python`) in a copy; its failure ends the bench."""
    tools = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run([str(tools / command[0]), *command[1:]], cwd=place, check=True, env=environment)
