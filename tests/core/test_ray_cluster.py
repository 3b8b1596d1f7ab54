"""What is said when the ray launcher cannot be used; tests/pipeline/test_ray.py runs a cluster."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from stages.core import devices
from stages.core.errors import UserError
from stages.core.params import Hardware
from stages.core.ray_cluster import find_places, ray_cluster

HARDWARE = Hardware(
    threads=1,
    processes="auto",
    engine="auto",
    generation_batch="auto",
    per_device_batch="auto",
    gradient_checkpointing=False,
)


class Nodes:
    """A cluster's nodes, as `ray.nodes()` lists them."""

    def __init__(self, *resources: dict[str, float], dead: int | None = None) -> None:
        self.listed = [
            {
                "NodeID": f"n{place}",
                "NodeManagerAddress": f"10.0.0.{place}",
                "Alive": place != dead,
                "Resources": one,
            }
            for place, one in enumerate(resources)
        ]

    def nodes(self) -> list[dict[str, Any]]:
        return self.listed


def test_without_ray_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"^the ray launcher needs Ray; `pip install -r requirements-ray\.txt`"
    ):
        ray_cluster().__enter__()


def test_the_launcher_is_chosen_by_the_environment_or_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOOPER_LAUNCHER", raising=False)
    assert devices.launcher() == "local"
    Path(".launcher").write_text("ray\n")
    assert devices.launcher() == "ray"
    monkeypatch.setenv("LOOPER_LAUNCHER", "local")
    assert devices.launcher() == "local"
    monkeypatch.setenv("LOOPER_LAUNCHER", "slurm")
    with pytest.raises(UserError, match="no launcher 'slurm'"):
        devices.launcher()


def test_gpus_are_used_where_there_are_any() -> None:
    nodes = Nodes({"CPU": 8, "GPU": 2}, {"CPU": 16}, {"CPU": 8, "GPU": 1})
    places = find_places(nodes, HARDWARE)
    assert [(place.host, place.number, place.gpus) for place in places] == [
        ("10.0.0.0", 0, 1),
        ("10.0.0.2", 0, 1),
        ("10.0.0.0", 1, 1),
    ]
    assert [place.cpus for place in places] == [4, 8, 4]


def test_hosts_without_gpus_run_the_processes_the_profile_says() -> None:
    nodes = Nodes({"CPU": 8}, {"CPU": 1}, {"CPU": 0}, {})
    assert [place.host for place in find_places(nodes, HARDWARE)] == ["10.0.0.0", "10.0.0.1"]
    several = find_places(nodes, HARDWARE.model_copy(update={"processes": 4}))
    assert [place.host for place in several].count("10.0.0.0") == 4
    assert [place.host for place in several].count("10.0.0.1") == 1
    assert all(place.cpus == (2 if place.host == "10.0.0.0" else 1) for place in several)


def test_a_dead_host_has_no_place() -> None:
    places = find_places(Nodes({"CPU": 1}, {"CPU": 1}, dead=1), HARDWARE)
    assert [place.host for place in places] == ["10.0.0.0"]
