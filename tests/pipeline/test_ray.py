"""A real Ray cluster of two nodes on this machine gives what one process gives, even when workers are killed.

    python -m pytest -m ray

Each node has a loopback address of its own (127.0.0.2 and 127.0.0.3, which Linux has by default), and the network guard
stops their processes from reaching further.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.processes import arguments, children

if TYPE_CHECKING:
    from tests.pipeline.conftest import Project

pytestmark = [
    pytest.mark.pipeline,
    pytest.mark.ray,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="Ray is not installed (requirements-ray.txt)"
    ),
]
HEAD, SECOND = "127.0.0.2", "127.0.0.3"
LONG = 600  # seconds that no step here should take, even on a busy machine


class Cluster:
    """Two nodes of one processor each, started as a user starts them."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # its sockets' names must be short
        with socket.socket() as probe:
            probe.bind((HEAD, 0))
            self.address = f"{HEAD}:{probe.getsockname()[1]}"
        self.environment = {
            **project.environment,
            "RAY_ADDRESS": self.address,
            "RAY_USAGE_STATS_ENABLED": "0",
            "LOOPBACK_ALLOWED": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, host: str) -> None:
        """Start a node and wait until it has joined."""
        where = ["--head", f"--port={self.address.split(':')[1]}", f"--temp-dir={self.folder}"]
        if host != HEAD:
            where = [f"--address={self.address}"]
        command = ["ray", "start", "--block", f"--node-ip-address={host}", "--num-cpus=1", "--num-gpus=0"]
        command += ["--object-store-memory=100000000", "--disable-usage-stats"]
        command += ["--include-dashboard=false"] if host == HEAD else []
        log = Path(self.folder) / f"{host}.log"
        with log.open("wb") as out:
            self.nodes[host] = subprocess.Popen(
                [*command, *where],
                cwd=self.folder,  # a worker must find the project by itself
                env=self.environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ray kills whole process groups, and the tests must not be in one
            )
        self.wait_for(lambda: b"block forever" in log.read_bytes(), log)

    def wait_for(self, holds: Callable[[], object], log: Path | None = None) -> None:
        """Wait until something holds. A node that ends by itself is a failure."""
        deadline = time.monotonic() + LONG
        while not holds():
            ended = [host for host, node in self.nodes.items() if node.poll() is not None]
            if ended or time.monotonic() > deadline:
                pytest.fail(f"{ended or 'it took too long'}: {log.read_text() if log else ''}")
            time.sleep(0.05)

    def raylet(self, host: str) -> int:
        """The main process of a node."""
        return next(
            pid for pid in children(self.nodes[host].pid) if arguments(pid)[0].endswith("raylet/raylet")
        )

    def workers(self, host: str, name: str) -> list[int]:
        """The processes of a node that run actors of a class."""
        return [pid for pid in children(self.raylet(host)) if arguments(pid)[0].startswith(f"ray::{name}")]

    def kill(self, host: str) -> None:
        """Kill all processes of a node at once, like a power cut."""
        family = [self.raylet(host), *children(self.raylet(host)), *children(self.nodes[host].pid)]
        self.nodes[host].kill()
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.nodes.pop(host).wait()

    def stop(self) -> None:
        """End all nodes, and all processes that they leave."""
        for host in list(self.nodes):
            with contextlib.suppress(OSError, StopIteration):
                self.kill(host)
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and any(self.folder in one for one in arguments(int(entry.name))):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(entry.name), signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def begin(self, stage: str) -> subprocess.Popen[str]:
        """Start a stage on the cluster, from nothing."""
        shutil.rmtree(self.project.root / ".work" / stage, ignore_errors=True)
        return subprocess.Popen(
            ["python", "-m", "stages", stage],
            cwd=self.project.root,
            env=self.environment | {"LOOPER_LAUNCHER": "ray"},
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, stage: subprocess.Popen[str]) -> str:
        """Wait for the end of a stage; returns what it printed."""
        said = stage.communicate(timeout=LONG)[1]
        assert stage.returncode == 0, said
        return said


@pytest.fixture(scope="module")
def project(copy_run: Callable[[], Project]) -> Project:
    """The small run with many small pieces of work."""
    copy = copy_run().cold
    copy.update("profiles/tiny.yaml", {"hardware.generation_batch": 16})
    return copy


@pytest.fixture(scope="module")
def running(project: Project) -> Iterator[Cluster]:
    cluster = Cluster(project)
    try:
        cluster.start(HEAD)
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def cluster(running: Cluster) -> Cluster:
    """The cluster with both nodes up, whatever an earlier test did to them."""
    if SECOND not in running.nodes:
        running.start(SECOND)
    return running


@pytest.fixture(scope="module")
def rollouts(project: Project) -> bytes:
    """The rollouts of one process without Ray."""
    project.stages("rollout", LOOPER_LAUNCHER="local")
    return (project.root / "data/rollouts/dpo.jsonl").read_bytes()


def test_another_launcher_reruns_nothing(project: Project) -> None:
    """Neither by the environment nor by the git-ignored file."""
    setting = project.root / ".launcher"
    changed = project.run("git", "status", "--porcelain").stdout
    assert project.status(LOOPER_LAUNCHER="ray") == {}
    setting.write_text("ray\n", encoding="utf-8")
    try:
        assert project.status() == {}
        assert project.run("git", "status", "--porcelain").stdout == changed
    finally:
        setting.unlink()


def test_without_a_cluster_one_line_says_what_to_start(project: Project) -> None:
    nobody = {"RAY_ADDRESS": f"{HEAD}:9", "LOOPBACK_ALLOWED": "1", "LOOPER_LAUNCHER": "ray"}
    done = project.stages("rollout", check=False, **nobody)
    assert done.returncode == 1
    assert "no Ray cluster could be reached" in done.stderr
    assert "ray start --head" in done.stderr
    assert "Traceback" not in done.stderr


def test_generation_gives_the_same_bytes(cluster: Cluster, rollouts: bytes) -> None:
    said = cluster.finish(cluster.begin("rollout"))
    assert "generating with 2 workers on 2 hosts" in said
    assert (cluster.project.root / "data/rollouts/dpo.jsonl").read_bytes() == rollouts


@pytest.mark.parametrize("fate", ["killed", "hanging", "its whole node killed"])
def test_a_lost_worker_costs_its_piece_only(cluster: Cluster, rollouts: bytes, fate: str) -> None:
    """Another worker does its piece again, and the result is the same."""
    stage = cluster.begin("rollout")
    cluster.wait_for(lambda: cluster.workers(HEAD, "Server"))
    (first,) = cluster.workers(HEAD, "Server")
    os.kill(first, signal.SIGSTOP)  # otherwise it may do everything before the second one has loaded
    cluster.wait_for(lambda: cluster.workers(SECOND, "Server.complete"))
    (second,) = cluster.workers(SECOND, "Server")
    os.kill(first, signal.SIGCONT)
    if fate == "its whole node killed":
        cluster.kill(SECOND)
    else:
        os.kill(second, signal.SIGSTOP if fate == "hanging" else signal.SIGKILL)
    said = cluster.finish(stage)
    assert (cluster.project.root / "data/rollouts/dpo.jsonl").read_bytes() == rollouts
    assert ("is gone" in said) == (fate != "hanging")


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_training_gives_the_same_adapter(
    cluster: Cluster,
    small_run: Project,
    stage: str,
    assert_same_adapter: Callable[[str, Project, Project], None],
) -> None:
    """Each of the two workers takes half of the global batch."""
    cluster.project.run("git", "checkout", "--quiet", "--", ":!profiles")
    cluster.project.run("dvc", "checkout", "--force", "--quiet")
    said = cluster.finish(cluster.begin(stage))
    assert_same_adapter(stage, small_run, cluster.project)
    assert "training with 2 workers" in said
    assert said.count("parameters trained") == 1  # only one worker prints


def test_a_mistake_that_training_finds_is_one_line(cluster: Cluster) -> None:
    profile = cluster.project.root / "profiles/tiny.yaml"
    before = profile.read_bytes()
    cluster.project.update("profiles/tiny.yaml", {"sft.max_tokens": 1})
    stage = cluster.begin("sft")
    said = stage.communicate(timeout=LONG)[1]
    profile.write_bytes(before)
    assert stage.returncode == 1
    assert said.count("are longer than sft.max_tokens; raise it") == said.count("error: ") == 1
    assert "Traceback" not in said


@pytest.mark.parametrize("fate", ["killed", "its whole node killed"])
def test_training_goes_on_after_a_loss(
    cluster: Cluster,
    small_run: Project,
    fate: str,
    assert_same_adapter: Callable[[str, Project, Project], None],
) -> None:
    """It goes on from the newest checkpoint, on the devices that are left."""
    stage = cluster.begin("sft")
    work = cluster.project.root / ".work/sft"
    cluster.wait_for(lambda: list(work.glob("*/trainer/checkpoint-*/complete")))
    if fate == "killed":
        (worker,) = cluster.workers(SECOND, "RayTrainWorker")
        os.kill(worker, signal.SIGKILL)
    else:
        cluster.kill(SECOND)
    said = cluster.finish(stage)
    assert "a worker is gone" in said
    assert "going on from step 0" not in said
    assert ("training with 1 workers" in said) == (fate != "killed")
    assert_same_adapter("sft", small_run, cluster.project)


def test_nothing_reached_for_the_internet(cluster: Cluster) -> None:
    """Except that the head asks which cloud it runs in, which Ray has no setting for (docs/gpus.md)."""
    attempts = cluster.project.guard / "attempts"
    tried = set(attempts.read_text().splitlines()) if attempts.exists() else set()
    assert tried <= {"('169.254.169.254', 80)"}
