"""Connects to the Ray cluster of the ray launcher, and finds the devices that can take part.

    with ray_cluster() as ray:
        # One Place for each GPU, or for each process of a host without GPUs; every host must have the same `files`.
        places = usable_places(ray, hardware, files, known)

The cluster is started by hand (`ray start`, docs/gpus.md); nothing here starts or ends a host.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.run.errors import UserError
from stages.run.files import sha256_file
from stages.run.guard import leave_on_sigterm
from stages.run.params import Hardware, load_params
from stages.run.paths import PARAMS, PROFILES
from stages.run.process import ALLOCATORS, DEFAULTS, OFFLINE, SILENT

CHECK_SECONDS = 120  # how long a host may take to answer
WAIT_SECONDS = 600.0  # how long a cluster may be without any device


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
    names = {*SILENT, *DEFAULTS, *ALLOCATORS, OFFLINE}
    settings = {name: os.environ[name] for name in names & {*os.environ}}
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
    leave_on_sigterm()  # Ray has set a handler of its own
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


def usable_places(ray: Any, hardware: Hardware, loaded: list[Path], known: dict[str, str]) -> list[Place]:
    """The devices of the hosts that have the same files at the same path: code, parameters, and what is `loaded`.

    `known` gets what is wrong with each host, by Ray's id ("": nothing); a host in it is not asked again. A host
    that gives no answer in time, perhaps because it died, is left out, and asked the next time.
    """
    places = find_places(ray, hardware)
    if unknown := {place.node: place.host for place in places if place.node not in known}:
        known |= _problems(ray, unknown, loaded)
    return [place for place in places if known.get(place.node) == ""]


def _problems(ray: Any, hosts: dict[str, str], loaded: list[Path]) -> dict[str, str]:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    files = [
        *sorted(Path("stages").rglob("*.py")),
        PARAMS,
        PROFILES / f"{load_params().profile}.yaml",
        *loaded,
    ]
    wanted = {str(path.resolve()): sha256_file(path) for path in files}

    # Defined here so that Ray sends it whole: a host without the project could not import it.
    def look(wanted: Mapping[str, str]) -> str:
        import hashlib
        from pathlib import Path

        for name, sha256 in wanted.items():
            if not Path(name).is_file():
                return f"has no {name}"
            if hashlib.sha256(Path(name).read_bytes()).hexdigest() != sha256:
                return f"has another {name}"
        return ""

    remote = ray.remote(num_cpus=0, max_retries=0)(look)
    asked = {}
    for node in hosts:
        here = NodeAffinitySchedulingStrategy(node, soft=False)
        asked[node] = remote.options(scheduling_strategy=here).remote(wanted)
    found = {}
    for node, answer in asked.items():
        with contextlib.suppress(ray.exceptions.RayError):
            problem = ray.get(answer, timeout=CHECK_SECONDS)
            found[node] = problem and (
                f"Ray worker host {hosts[node]} {problem}; every host needs this project, its checkpoints included, "
                "at the same path (a shared folder is best, and training needs one)"
            )
    return found


def last_line(error: Exception) -> str:
    """The last line of an error of Ray's, which says what happened; the traceback before it does not."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
