"""The devices of a Ray cluster. tests/pipeline/test_ray.py runs stages on a real one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from stages.launch.ray_cluster import find_places, ray_cluster
from stages.run.errors import UserError
from stages.run.params import load_params

HARDWARE = load_params(Path(__file__).resolve().parents[1] / "small").hardware.model_copy(
    update={"processes": "auto"}
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


def test_gpus_are_used_where_there_are_any() -> None:
    nodes = Nodes({"CPU": 8, "GPU": 2}, {"CPU": 16}, {"CPU": 8, "GPU": 1})
    places = find_places(nodes, HARDWARE)
    assert [(place.host, place.number, place.gpus) for place in places] == [
        ("10.0.0.0", 0, 1),
        ("10.0.0.2", 0, 1),
        ("10.0.0.0", 1, 1),
    ]
    assert [place.cpus for place in places] == [4, 8, 4]


def test_hosts_without_gpus_run_as_many_processes_as_the_profile_says() -> None:
    """A host without a free processor, or one that is dead, has none."""
    nodes = Nodes({"CPU": 8}, {"CPU": 1}, {"CPU": 0}, {}, {"CPU": 8}, dead=4)
    assert [place.host for place in find_places(nodes, HARDWARE)] == ["10.0.0.0", "10.0.0.1"]
    several = find_places(nodes, HARDWARE.model_copy(update={"processes": 4}))
    assert [place.host for place in several].count("10.0.0.0") == 4
    assert [place.host for place in several].count("10.0.0.1") == 1
    assert all(place.cpus == (2 if place.host == "10.0.0.0" else 1) for place in several)
