"""What `results --experiments` makes of DVC's records. tests/pipeline/test_experiments.py runs a real queue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stages.run.errors import UserError
from stages.tools.experiments import Experiment, changes, is_current, luck, main, tried

PARAMS = {"params.yaml": {"seed": 17}, "profiles/tiny.yaml": {"dpo": {"beta": 0.1, "batch": 16}}}


def lock() -> dict[str, Any]:
    """Three stages in a row; the last one reads a file in the folder that the first one wrote."""
    return {
        "prepare": {"params": {"params.yaml": {"seed": 17}}, "outs": [{"path": "data", "md5": "1"}]},
        "dpo@dpo": {
            "params": {"profiles/tiny.yaml": {"dpo": {"beta": 0.1, "batch": 16}}},
            "deps": [{"path": "data/valid.jsonl", "md5": "2"}, {"path": "stages/dpo.py", "md5": "3"}],
            "outs": [{"path": "adapter", "md5": "4"}],
        },
        "evaluate@dpo": {"deps": [{"path": "adapter", "md5": "4"}, {"path": "data/test.jsonl", "md5": "5"}]},
    }


def test_outputs_are_those_of_the_parameters() -> None:
    assert is_current(lock(), PARAMS, "evaluate@dpo")
    assert not is_current({}, PARAMS, "dpo@dpo")


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        ({"profiles/tiny.yaml": {"dpo": {"beta": 0.2, "batch": 16}}}, {"dpo@dpo", "evaluate@dpo"}),
        ({"params.yaml": {"seed": 18}}, {"prepare", "dpo@dpo", "evaluate@dpo"}),
    ],
)
def test_a_stage_that_did_not_run_with_them_is_told(change: dict[str, Any], stale: set[str]) -> None:
    assert {name for name in lock() if not is_current(lock(), PARAMS | change, name)} == stale


def test_an_experiment_that_ended_at_dpo_has_no_evaluation() -> None:
    """The evaluation in its commit is of another adapter."""
    ended = lock()
    ended["dpo@dpo"]["outs"] = [{"path": "adapter", "md5": "6"}]
    assert is_current(ended, PARAMS, "dpo@dpo") and not is_current(ended, PARAMS, "evaluate@dpo")


def test_changed_parameters_have_their_dotted_names() -> None:
    other = {"params.yaml": {"seed": 18, "new": 1}, "profiles/tiny.yaml": {"dpo": {"beta": 0.1, "batch": 8}}}
    assert changes(PARAMS, other) == {"seed": 18, "new": 1, "dpo.batch": 8}
    assert changes(PARAMS, PARAMS) == {}


def experiment(name: str, state: str, score: float | None = None, questions: int = 100) -> Experiment:
    kept = {"kept": 0, "score_start": score, "questions": questions}
    return Experiment(name, state, name, PARAMS, {}, kept if score is not None else None)


def test_the_count_and_the_luck_of_the_best() -> None:
    """The largest of four is 1.03 standard errors up on average, 1.05 by Blom; 80 % of 100 has one of 4 points."""
    found = [experiment(str(i), "success", 0.8) for i in range(4)]
    assert tried([*found, experiment("x", "failed")]).startswith("5 tried (4 success, 1 failed). ")
    assert "by up to 4.2 points on 100 questions" in luck(found)[0]
    assert luck(found[:1]) == []
    assert "do not compare" in luck([*found, experiment("y", "success", 0.7, 50)])[1]


def test_dvc_that_cannot_list_them_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"`dvc exp show` failed: .*not inside of a DVC repository"):
        main(None)
