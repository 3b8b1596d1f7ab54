"""Which launcher, how many processes and which engine a stage uses on the devices that it finds."""

from __future__ import annotations

import importlib.machinery
from pathlib import Path

import pytest
import torch

from stages.launch import devices
from stages.run.errors import UserError
from stages.run.params import load_params

SMALL = Path(__file__).resolve().parents[1] / "small"


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


@pytest.mark.parametrize(
    ("available", "batch", "limit", "processes", "rows"),
    [(1, 16, 8, 1, 8), (2, 16, 8, 2, 8), (3, 16, 8, 2, 8), (8, 12, 2, 6, 2), (2, 12, 4, 2, 3), (9, 4, 1, 4, 1)],
)  # fmt: skip
def test_the_global_batch_does_not_depend_on_the_devices(
    available: int, batch: int, limit: int, processes: int, rows: int
) -> None:
    """Processes and rows divide it, so that every optimizer step takes exactly the rows that the profile says."""
    assert devices.training_processes(available, batch) == processes
    assert devices.micro_batch(batch, processes, limit) == rows
    assert batch % (rows * processes) == 0


@pytest.mark.parametrize(("gpus", "vllm"), [(0, False), (0, True), (2, False), (2, True)])
def test_auto_is_vllm_on_a_gpu_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, gpus: int, vllm: bool
) -> None:
    specs = {"vllm": importlib.machinery.ModuleSpec("vllm", None)} if vllm else {}
    monkeypatch.setattr(devices.importlib.util, "find_spec", specs.get)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    profile = load_params(SMALL).hardware
    kinds = {"auto": "vllm" if gpus and vllm else "transformers", "transformers": "transformers"}
    for engine, kind in kinds.items():
        assert devices.engine_kind(profile.model_copy(update={"engine": engine})) == kind
    named = profile.model_copy(update={"engine": "vllm"})
    if vllm:
        assert devices.engine_kind(named) == "vllm"
    else:
        with pytest.raises(UserError, match=r"vllm is not installed; `pip install -r requirements-gpu\.txt`"):
            devices.engine_kind(named)
