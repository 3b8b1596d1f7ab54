"""Which trackers LOOPER_TRACKERS may name, and where they write. tests/pipeline/test_experiments.py trains with one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stages.run import trackers
from stages.run.errors import UserError
from stages.run.trackers import VARIABLE, named_trackers, tracker_callbacks

WORK = Path(".work/sft/0123456789abcdef")


@pytest.fixture
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with no package but a tensorboardX, as the project and in the path; the environment is put back."""
    (tmp_path / "tensorboardX.py").write_text("SummaryWriter = None\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(trackers, "HOME", tmp_path)
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})
    return tmp_path


def test_by_default_there_are_none(clean: Path) -> None:
    assert named_trackers() == tracker_callbacks(WORK) == []
    assert not [name for name in os.environ if name.startswith(("TENSORBOARD", "TRACKIO", "WANDB"))]


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("tensorbord", "LOOPER_TRACKERS: 'tensorbord' is unknown; name some of tensorboard, trackio, "),
        ("tensorboard, none-such", "LOOPER_TRACKERS: 'none-such' is unknown"),
        ("missing", "LOOPER_TRACKERS: missing is not installed; `pip install no_such_package`"),
    ],
)
def test_an_unknown_or_missing_one_is_told(
    clean: Path, monkeypatch: pytest.MonkeyPatch, named: str, words: str
) -> None:
    monkeypatch.setitem(trackers.PACKAGES, "missing", ("no_such_package",))
    monkeypatch.setitem(os.environ, VARIABLE, named)
    with pytest.raises(UserError) as refused:
        named_trackers()
    assert str(refused.value).startswith(words)


def test_logs_go_to_the_project_unless_the_user_says_where(
    clean: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, VARIABLE, "tensorboard")
    (callback,) = tracker_callbacks(WORK)
    assert callback.logging_dir == str(clean / ".work/trackers/tensorboard/sft-01234567")
    monkeypatch.setitem(os.environ, "TENSORBOARD_LOGGING_DIR", "/elsewhere")
    (callback,) = tracker_callbacks(WORK)
    assert callback.logging_dir == "/elsewhere"
    assert not any(name.startswith("WANDB") for name in os.environ)


def test_only_the_first_process_has_them(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, VARIABLE, "tensorboard")
    for rank, count in (("0", 1), ("1", 0)):
        monkeypatch.setitem(os.environ, "RANK", rank)
        assert len(tracker_callbacks(WORK)) == count
