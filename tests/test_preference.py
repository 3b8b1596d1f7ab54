"""preference: what it refuses, and that it needs no text. How pairs are chosen: tests/regime_w/test_pairs.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from stages import preference
from stages.run.errors import UserError
from stages.run.paths import LAST_ROUND

REPO = Path(__file__).resolve().parents[1]
OUT = Path("data/pairs.jsonl")
ROW = {"id": "q/0", "text": "#### 10", "correct": True, "fault": None, "reward": 1.0}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ROW, r"^in\.jsonl: not one pair could be made of 1 trajectories, 1 of them right \(refused: no can"),
        ({**ROW, "reward": None}, "question 'q': trajectory 0 has no usable 'reward'"),
        # As coherence wrote it when preference still read the texts itself.
        (
            {key: value for key, value in ROW.items() if key != "fault"},
            "trajectory 0 has no usable 'fault'; give the",
        ),
        ({**ROW, "fault": True}, "question 'q', trajectory 0: field 'fault' must be text, found true"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_leaves_the_old_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: dict[str, Any], message: str
) -> None:
    shutil.copytree(REPO / "tests" / "small", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    OUT.parent.mkdir()
    OUT.write_text("old\n")
    record = {"id": "q", "question": "How many?", "gold": "10", "trajectories": [row]}
    Path("in.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match=message) as caught:
        preference.main(LAST_ROUND, Path("in.jsonl"), OUT, Path("metrics/preference.json"))
    assert "\n" not in str(caught.value)
    assert OUT.read_text() == "old\n"
