"""Connects to the Ray cluster of the ray launcher, and finds the devices that can take part.

    with ray_cluster() as ray:
        places = find_places(ray, hardware)  # one Place for each GPU, or for each process of a host without GPUs
        check_hosts(ray, places, files)      # does every host have this project's files at the same path?

The cluster is started by hand (`ray start`, docs/gpus.md); nothing here starts or ends a host.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.run.errors import UserError
from stages.run.files import sha256_file
from stages.run.params import Hardware, load_params
from stages.run.paths import PARAMS, PROFILES
from stages.run.process import OFFLINE, SAME_ARITHMETIC, SILENT

CHECK_SECONDS = 120  # how long a host may take to answer


@dataclass(frozen=True)
class Place:
    """One device of the cluster: a GPU, or a part of the processors of a host."""

    node: str  # Ray's id
    host: str  # address
    number: int  # on its host
    cpus: int
    gpus: int


@contextlib.contextmanager
def ray_cluster() -> Iterator[Any]:
    """Connect to the cluster (RAY_ADDRESS, else the one this host belongs to); gives the ray module.

    Raises UserError when Ray is not installed or no cluster can be reached.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError(
            "the ray launcher needs Ray; `pip install -r requirements-ray.txt`, or unset LOOPER_LAUNCHER and "
            "remove .launcher to use this host alone"
        )
    import ray

    # A worker reads these before it imports torch; so do the processes that Ray Train starts.
    names = (*SILENT, *SAME_ARITHMETIC, *OFFLINE)
    settings = {name: os.environ[name] for name in names if name in os.environ}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        _knock(os.environ.get("RAY_ADDRESS", ""))
        ray.init(
            address="auto", runtime_env={"env_vars": settings}, log_to_driver=False, logging_level="error"
        )
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"no Ray cluster could be reached ({reason}); start one with `ray start --head` (docs/gpus.md)"
        ) from None
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray sets its own
    try:
        yield ray
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raise OSError when nobody listens at `host:port`; Ray would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def find_places(ray: Any, hardware: Hardware) -> list[Place]:
    """The devices of the hosts that are up: all GPUs, or `hardware.processes` on each host when there are none.

    A host started with `ray start --num-cpus=0 --num-gpus=0` takes no part.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    places = []
    have_gpus = any(node["Resources"].get("GPU", 0) >= 1 for node in nodes)
    wanted = 1 if hardware.processes == "auto" else hardware.processes
    for node in nodes:
        cpus, gpus = (int(node["Resources"].get(kind, 0)) for kind in ("CPU", "GPU"))
        count = min(gpus, cpus) if have_gpus else min(wanted, cpus)
        places += [
            Place(node["NodeID"], node["NodeManagerAddress"], number, cpus // count, int(have_gpus))
            for number in range(count)
        ]
    return sorted(places, key=lambda place: (place.number, place.host, place.node))


def needed_files(*more: Path) -> list[Path]:
    """The files that a worker reads: code, parameters and `more` (the manifests of what it loads)."""
    code = sorted(Path("stages").rglob("*.py"))
    return [*code, PARAMS, PROFILES / f"{load_params().profile}.yaml", *more]


def check_hosts(ray: Any, places: Sequence[Place], files: Sequence[Path]) -> dict[str, str]:
    """What is wrong with the hosts of `places`, by Ray's id: each must have the same `files` at the same path.

    A host that gave no answer in time, perhaps because it died, has "" here.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    wanted = {str(path.resolve()): sha256_file(path) for path in files}

    # Defined here so that Ray sends it whole: a host without the project could not import it.
    def look(wanted: Mapping[str, str]) -> str | None:
        import hashlib
        from pathlib import Path

        for name, sha256 in wanted.items():
            if not Path(name).is_file():
                return f"has no {name}"
            if hashlib.sha256(Path(name).read_bytes()).hexdigest() != sha256:
                return f"has another {name}"
        return None

    remote = ray.remote(num_cpus=0, max_retries=0)(look)
    asked = {}
    for place in places:
        if place.node not in asked:
            here = NodeAffinitySchedulingStrategy(place.node, soft=False)
            asked[place.node] = remote.options(scheduling_strategy=here).remote(wanted)
    problems = {}
    for node, answer in asked.items():
        try:
            if problem := ray.get(answer, timeout=CHECK_SECONDS):
                problems[node] = problem
        except ray.exceptions.RayError:
            problems[node] = ""
    return problems


def describe_problem(place: Place, problem: str) -> str:
    """One line on a host that cannot take part."""
    return (
        f"Ray worker host {place.host} {problem}; every host needs this project, its checkpoints included, at "
        f"the same path (a shared folder is best, and training needs one)"
    )
