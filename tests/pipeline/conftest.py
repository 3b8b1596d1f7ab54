"""One small but real run of the whole pipeline, shared by every test that needs trained weights.

The run lies in a temporary git repository, so nothing in this checkout is touched. Tests that change something work on
a copy of it. Several pytest workers share it. No process of a run may open an internet connection: an attempt fails and
is noted. Where Linux lets a user make a network namespace, the run has no network at all.

Its commands are forks of a Python that has imported everything already (tests/warm.py), except those of Project.cold.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.warm import warm_python

REPO = Path(__file__).resolve().parents[2]

# Less of everything, but enough for pairs of both kinds.
SMALL: dict[str, dict[str, Any]] = {
    "data": {"train": 150, "valid": 30, "platinum": 60, "tests": {"larger": {"questions": 12}}},
    "sft": {"examples": 120, "epochs": 2, "batch": 8, "learning_rate": 1e-3, "checkpoint_steps": 10,
        "select": {"steps": 30, "questions": 15, "samples": 1, "level": 1.0},
    },
    "rollout": {"questions": 50},
    "dpo": {
        "batch": 8, "learning_rate": 2e-4, "checkpoint_steps": 8,
        "select": {"steps": 8, "questions": 15, "samples": 1, "level": 1.0},
    },
    "evaluate": {"samples": 4},
    "hardware": {"threads": 1},
}  # fmt: skip

# With LOOPBACK_ALLOWED in the environment a process may reach its own machine, as Ray's processes do.
NETWORK_GUARD = """
import os, socket

def guarded(real):
    def connect(self, address, *rest):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            own = str(address[0]).startswith("127.") or address[0] in ("localhost", "::1")
            if not (own and os.environ.get("LOOPBACK_ALLOWED")):
                with open(os.environ["NETWORK_ATTEMPTS"], "a") as log:
                    log.write(f"{address}\\n")
                raise OSError("the tests run without a network")
        return real(self, address, *rest)
    return connect

def lookup(host, *rest, real=socket.getaddrinfo, **words):
    if not os.environ.get("LOOPBACK_ALLOWED"):
        with open(os.environ["NETWORK_ATTEMPTS"], "a") as log:
            log.write(f"name {host}\\n")
        raise OSError("the tests run without a network")
    return real(host, *rest, **words)

socket.getaddrinfo = lookup
socket.socket.connect = guarded(socket.socket.connect)
socket.socket.connect_ex = guarded(socket.socket.connect_ex)
"""


# Before a command, this gives it a network namespace of its own, whose only interface, `lo`, is down.
CUT = ["unshare", "--map-root-user", "--net"]
if not shutil.which(CUT[0]) or subprocess.run([*CUT, "true"], capture_output=True, check=False).returncode:
    CUT = []


@dataclass(frozen=True)
class Project:
    """A copy of this project in a folder of its own."""

    root: Path
    guard: Path  # holds the network guard, its log and DVC's site cache
    warm: Path | None = None  # the programs of the warm parent

    @property
    def cold(self) -> Project:
        """The project, with commands that start a Python of their own."""
        return replace(self, warm=None)

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the project's commands: the Python first in the path, and no network."""
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("HF_", "DVC_"))
        }
        programs = [str(self.warm)] if self.warm else []
        return {
            **inherited,
            "PATH": os.pathsep.join([*programs, str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(self.guard),
            "NETWORK_ATTEMPTS": str(self.guard / "attempts"),
            "DVC_SITE_CACHE_DIR": str(self.guard / "dvc"),
            "COLUMNS": "120",
        }

    def run(self, *command: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the project. If it fails, the test fails with what it printed.

        With an environment of its own it is cold: a library may read that during its import.
        """
        environment = (self.cold if env else self).environment | env
        done = subprocess.run(
            command, cwd=self.root, env=environment, capture_output=True, text=True, check=False
        )
        if check and done.returncode:
            pytest.fail(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done

    def stages(self, *arguments: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        """`python -m stages ...`."""
        return self.run("python", "-m", "stages", *arguments, check=check, **env)

    def repro(self, *arguments: str) -> list[str]:
        """`dvc repro ...`; returns the stages whose commands ran, in order."""
        return re.findall(r"Running stage '([^']+)'", self.run("dvc", "repro", *arguments).stdout)

    def status(self, **env: str) -> dict[str, Any]:
        """`dvc status`: the stages that are out of date by themselves, and why."""
        return json.loads(self.run("dvc", "status", "--json", check=True, **env).stdout)

    def update(self, file: str, values: dict[str, Any]) -> None:
        """Set keys of a YAML file, written with dots between the levels. Comments stay."""
        path, yaml = self.root / file, YAML()
        tree = yaml.load(path.read_text(encoding="utf-8"))
        for name, value in values.items():
            *above, last = name.split(".")
            place = tree
            for part in above:
                place = place[part]
            assert last in place, f"{file} has no {name}"
            place[last] = value
        with path.open("w", encoding="utf-8") as out:
            yaml.dump(tree, out)


def flatten(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}": value}
    return flat


@contextlib.contextmanager
def once(mark: Path) -> Iterator[bool]:
    """Whether the block must do its work, because no worker did. The others wait for it meanwhile."""
    with mark.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not mark.exists()
        mark.touch()


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this session share."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "common"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def small_project(common: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """The files of this checkout with a smaller tiny profile, committed to a new git repository. Nothing has run."""
    project = Project(common / "project", common / "guard")
    with once(common / "made") as first:
        if first:
            make_small_project(project)
    if sys.platform != "linux":
        yield project
        return
    with warm_python(tmp_path_factory.mktemp("warm"), project.environment, CUT) as programs:
        yield replace(project, warm=programs)


def make_small_project(project: Project) -> None:
    """Copy this checkout and commit it."""
    project.guard.mkdir()
    (project.guard / "sitecustomize.py").write_text(NETWORK_GUARD, encoding="utf-8")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (REPO / name).is_file():  # git also lists files that are deleted but not staged
            (project.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO / name, project.root / name)
    (project.root / "dvc.lock").unlink(missing_ok=True)
    project.update("params.yaml", {"profile": "tiny"})
    project.update("profiles/tiny.yaml", flatten(SMALL))
    project.run("git", "init", "--quiet")
    commit_all(project, "small")


def commit_all(project: Project, message: str) -> None:
    """Commit all files, without git's own user settings."""
    project.run("git", "add", "--all")
    who = ["-c", "user.name=tests", "-c", "user.email=tests@localhost", "-c", "commit.gpgsign=false"]
    project.run("git", *who, "commit", "--quiet", "--message", message)


@pytest.fixture(scope="session")
def cut() -> list[str]:
    """CUT: what cuts a command off the network, as `small_run` was; empty where that is not possible."""
    return CUT


@pytest.fixture(scope="session")
def small_run(small_project: Project, common: Path) -> Project:
    """The small project after one `dvc repro` from nothing, committed. Read it, never change it."""
    with once(common / "run") as first:
        if first:
            before = [] if small_project.warm else CUT  # the warm parent is cut off already
            ran = re.findall(r"Running stage '([^']+)'", small_project.run(*before, "dvc", "repro").stdout)
            assert len(ran) == 15, ran  # every stage, evaluate and vote three times
            commit_all(small_project, "run")
    return small_project


@pytest.fixture(scope="session")
def copy_run(small_run: Project, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Project]:
    """A function that copies the small run, with its DVC cache and history, for tests that change something."""

    def copy() -> Project:
        folder = tmp_path_factory.mktemp("copy")
        shutil.copytree(small_run.root, folder / "project", symlinks=True)
        shutil.copytree(small_run.guard, folder / "guard")
        (folder / "guard" / "attempts").unlink(missing_ok=True)
        return replace(small_run, root=folder / "project", guard=folder / "guard")

    return copy


@pytest.fixture(scope="session")
def assert_same_adapter() -> Callable[[str, Project, Project], None]:
    """A check that two projects have the same adapter of a stage ("sft" or "dpo"), up to rounding.

    Several processes add sums in another order, and each step carries the difference on.
    """
    import torch
    from safetensors.torch import load_file

    folders = {"sft": "checkpoints/sft_lora", "dpo": "checkpoints/dpo_coherence_lora/dpo"}

    def check(stage: str, one: Project, other: Project) -> None:
        file = Path(folders[stage]) / "adapter_model.safetensors"
        first, second = load_file(one.root / file), load_file(other.root / file)
        assert first.keys() == second.keys() and first
        for name, wanted in first.items():
            torch.testing.assert_close(second[name], wanted, atol=2e-4, rtol=2e-2)

    return check
