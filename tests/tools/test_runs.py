"""runs: what ran here, when, how long and with how much memory."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from stages import prepare
from stages.run.errors import UserError
from stages.run.files import write_json
from stages.tools import runs
from tests.tools.screen import printed

SMALL = Path(__file__).resolve().parents[1] / "small"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the tests' own parameters."""
    shutil.copytree(SMALL, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_real_run_is_listed(workplace: Path) -> None:
    """Stage, time, seconds, memory and the revision it ran at, packed by `git gc` or not."""
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"], ["pack-refs", "--all"]):
        subprocess.run([*git, *command], check=True)
    revision = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    prepare.main()
    pattern = rf"prepare +\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d +\d+\.\d +[\d,]+ +{revision[:7]}"
    assert re.search(pattern, printed(runs.main))


def test_oldest_first_and_a_run_outside_git(workplace: Path) -> None:
    """The order they ran in; no revision is no mistake."""
    facts = {"seconds": 1234.5, "peak_memory_mib": 2048, "revision": None}
    for stage, when in (("sft", "2026-01-02T03:04:05Z"), ("evaluate@dpo", "2026-01-01T00:00:00Z")):
        path = workplace / ".work" / "runs" / f"{when.replace(':', '')}-{stage}.json"
        write_json(path, {"stage": stage, "started": when, **facts})
    text = printed(runs.main)
    assert text.index("evaluate@dpo") < text.index("sft")
    assert re.search(r"sft +2026-01-02 03:04:05 +1,234\.5 +2,048 *$", text, re.MULTILINE)


def test_nothing_ran_yet(workplace: Path) -> None:
    with pytest.raises(UserError, match="no stage has run on this machine yet; run `dvc repro`"):
        runs.main()
