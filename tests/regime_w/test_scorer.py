"""Scoring one question: what is added to it, what may never be chosen in a pair, and a scorer of one's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from stages.regime_w.scorer import QuestionScorer, load_scorer
from stages.regime_w.tally import Tally
from stages.run.errors import UserError
from stages.run.params import load_params
from tests.regime_w.worked_example import QUESTION, TEXTS

REPO = Path(__file__).resolve().parents[2]
SHIPPED = REPO / "stages" / "regime_w" / "signals.py"


def question(*texts: str, **more: Any) -> dict[str, Any]:
    trajectories = [{"text": text, "tokens": 10, "finish": "stop"} for text in texts]
    return {"id": "q1", "question": QUESTION, "gold": "10", "trajectories": trajectories, **more}


def scored(record: dict[str, Any], scorer: Path = SHIPPED) -> dict[str, Any]:
    params = load_params(REPO / "tests" / "small").regime_w.model_copy(update={"scorer": str(scorer)})
    return dict(json.loads(QuestionScorer(params).score(record, Tally())))


def test_scoring_its_own_output_again_changes_nothing() -> None:
    once = scored(question(*TEXTS, solution=TEXTS[0]))
    assert json.dumps(scored(once)) == json.dumps(once)


def test_a_next_problem_is_not_read() -> None:
    """Equations after the answer belong to another problem."""
    leaking = TEXTS[0] + "\n\nQuestion:\nTom has 9 pens.\nAnswer:\n9+9 = 18\n#### 18"
    assert [row["s_wm"] for row in scored(question(leaking, TEXTS[0]))["trajectories"]] == [1.0, 1.0]


def test_optional_fields_may_be_absent() -> None:
    record = {"id": "q", "question": QUESTION, "gold": 10, "trajectories": [{"text": text} for text in TEXTS]}
    rows = scored(record)["trajectories"]
    assert [row["soundness"] for row in rows] == ["unproven", "unproven", "unproven", None]


@pytest.mark.parametrize(
    ("fault", "more"),
    [
        (None, {}),
        (None, {"text": TEXTS[3]}),  # a wrong answer is no fault
        (None, {"text": f"{TEXTS[0]}<|im_end|>\n"}),
        (None, {"text": f"{TEXTS[0]}</s></s>"}),
        ("truncated", {"finish": "length"}),
        ("truncated", {"finish": "length", "text": " "}),
        ("empty", {"text": " \n"}),
        ("leaking", {"text": "x\n#### 10\n\nQuestion:\nTom has 3."}),
        ("leaking", {"text": f"Question:\n{QUESTION}\nAnswer:\n#### 10"}),
        ("leaking", {"text": "#### 10</s> and on"}),
        ("answerless", {"text": "about ten, 10"}),
    ],
)
def test_every_trajectory_says_why_it_may_not_be_chosen(fault: str | None, more: dict[str, Any]) -> None:
    record = question(*TEXTS)
    record["trajectories"][0] |= more
    rows = scored(record)["trajectories"]
    assert [row["fault"] for row in rows] == [fault, None, None, None]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (question(*TEXTS, gold="none"), "question 'q1': its gold 'none' is no number"),
        (question("x", other="\ud800"), "question 'q1': cannot be written as JSON"),
    ],
)
def test_a_bad_record_is_named(record: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        scored(record)


# ---- A scorer of one's own ---------------------------------------------------------------------------

FLAT = "def score_group(question, trajectories):\n    k = len(trajectories)\n    flat = [{value}] * {size}\n"
FLAT += "    return dict(s_end=flat, s_path=flat, s_cf=flat, s_wm=flat)\n"


def test_a_scorer_file_of_ones_own_is_used(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(FLAT.format(value=0.25, size="k"))
    record = scored(question(*TEXTS), tmp_path / "own.py")
    assert [row["s_wm"] for row in record["trajectories"]] == [0.25] * 4
    assert record["s_end"] == 0.25


def test_a_copy_of_the_shipped_scorer_gives_the_same_numbers(tmp_path: Path) -> None:
    shutil.copy(SHIPPED, tmp_path / "copy.py")
    assert load_scorer(SHIPPED) is None and load_scorer(tmp_path / "copy.py") is not None
    assert scored(question(*TEXTS), tmp_path / "copy.py") == scored(question(*TEXTS))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FLAT.format(value="1 / 0", size="k"), "question 'q1': the scorer raised ZeroDivisionError"),
        (FLAT.format(value=0.5, size="(k + 1)"), "question 'q1': s_end has 5 values for 4 trajectories"),
        (FLAT.format(value="float('nan')", size="k"), "question 'q1': s_end holds nan"),
        (FLAT.format(value=1.01, size="k"), "question 'q1': s_end holds 1.01"),
        (FLAT.format(value="'high'", size="k"), "question 'q1': s_end must be a list of numbers"),
        ("x = 1\n", "has no function score_group"),
        ("import nothing_like_this\n", "cannot be loaded"),
        (None, r"regime_w\.scorer: .*own\.py is not a file"),
    ],
)
def test_a_bad_scorer_is_one_clear_line(tmp_path: Path, text: str | None, message: str) -> None:
    own = tmp_path / "own.py"
    if text is not None:
        own.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        scored(question(*TEXTS), own)
    assert "\n" not in str(caught.value)
