"""Rollouts from elsewhere: what means the same is read alike, and the rest is one line, the same in every tool."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages import coherence, preference
from stages.regime_w.record import read_questions
from stages.run.errors import UserError
from stages.run.files import read_json, read_jsonl
from stages.run.paths import LAST_ROUND
from stages.tools import explain, pairs, suspects
from tests.regime_w.worked_example import QUESTION, TEXTS
from tests.tools.screen import printed

REPO = Path(__file__).resolve().parents[2]
FILE, SCORED, PAIRS = Path("in.jsonl"), Path("data/scored.jsonl"), Path("data/pairs.jsonl")
METRICS, PLOTS = Path("metrics/m.json"), Path("metrics/plots")
TOOLS: dict[str, Callable[[], Any]] = {
    "coherence": lambda: coherence.main(LAST_ROUND, FILE, SCORED, METRICS, PLOTS, cores=1),
    "preference": lambda: preference.main(LAST_ROUND, FILE, PAIRS, METRICS),
    "explain": lambda: printed(explain.main, "a", FILE),
    "suspects": lambda: printed(suspects.main, FILE),
}
NO_NUMBER_OF_TOKENS = "a number of tokens, or the list of their ids"


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory with small parameters and the shipped scorer."""
    shutil.copytree(REPO / "tests" / "small", tmp_path, dirs_exist_ok=True)
    (tmp_path / "scorer.py").symlink_to(REPO / "stages" / "regime_w" / "signals.py")
    monkeypatch.chdir(tmp_path)


def question(*changes: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A scored question of two trajectories, the first of them right, each with its `changes`."""
    texts, right = (TEXTS[0], TEXTS[3]), (True, False)
    rows = [
        {"text": text, "correct": one, "fault": None, "reward": float(one)}
        for text, one in zip(texts, right, strict=True)
    ]
    for row, change in zip(rows, changes, strict=False):
        row |= change
    record = {"id": "a", "question": QUESTION, "gold": "10", "suspicion": 0.0, "trajectories": rows}
    return {**record, **more}


def write(*records: dict[str, Any]) -> None:
    FILE.write_text("".join(json.dumps(record) + "\n" for record in records))


def first(change: dict[str, Any], scored: bool = True) -> dict[str, Any]:
    """The first trajectory as it is read, when the file has it with this `change`."""
    write(question(change))
    return dict(next(read_questions(FILE, scored))["trajectories"][0])


@pytest.mark.parametrize(
    ("key", "found", "made"),
    [
        ("tokens", "30", 30),
        ("tokens", " 30.0 ", 30),
        ("tokens", 30.0, 30),
        ("tokens", [11, 0, 7], 3),
        ("tokens", ["9", " apples"], 2),
        ("tokens", [], 0),
        ("id", 0, "0"),
        ("id", 3.0, "3"),
        ("arm", 7, "7"),
        ("style", "plain", "plain"),
        ("logprob", "-3.5e1", -35.0),
        ("logprob", -3, -3),
        ("temperature", "0.7", 0.7),
        ("seed", "4042710300910532474", 4042710300910532474),
        ("uniform", 1, True),
        ("finish", "length", "length"),
        ("correct", 0.0, False),
        ("reward", "1.5", 1.5),
        ("answer", 10.0, "10"),
        ("answer", 0.5, "0.5"),
        ("answer", None, None),
        ("fault", None, None),
        ("unknown", [None, {"x": 1}], [None, {"x": 1}]),
    ],
)
def test_what_means_the_same_is_read_alike(key: str, found: object, made: object) -> None:
    value = first({key: found})[key]
    assert (value, type(value)) == (made, type(made))


@pytest.mark.parametrize(
    "key", ["id", "arm", "style", "tokens", "logprob", "finish", "seed", "reward", "s_wm"]
)
@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_null_and_nan_say_nothing(key: str, nothing: object) -> None:
    row = first({key: nothing})
    assert row["id"] == "a/0" and (key == "id" or key not in row)


def test_an_earlier_scoring_is_not_looked_at_when_it_is_written_anew() -> None:
    assert first({"reward": ["odd"]}, scored=False)["reward"] == ["odd"]
    TOOLS["coherence"]()
    assert next(read_jsonl(SCORED))["trajectories"][0]["reward"] == 1.0


@pytest.mark.parametrize(
    ("key", "found", "wanted", "shown"),
    [
        ("tokens", True, NO_NUMBER_OF_TOKENS, "true"),
        ("tokens", "many", NO_NUMBER_OF_TOKENS, '"many"'),
        ("tokens", 2.5, NO_NUMBER_OF_TOKENS, "2.5"),
        ("tokens", -1, NO_NUMBER_OF_TOKENS, "-1"),
        ("tokens", 10**400, NO_NUMBER_OF_TOKENS, "1" + "0" * 59),
        ("tokens", [1, None], NO_NUMBER_OF_TOKENS, "[1, null]"),
        ("tokens", [True], NO_NUMBER_OF_TOKENS, "[true]"),
        ("tokens", [[1, 2]], NO_NUMBER_OF_TOKENS, "[[1, 2]]"),
        ("tokens", {"n": 3}, NO_NUMBER_OF_TOKENS, '{"n": 3}'),
        ("id", True, "text or a whole number", "true"),
        ("id", 1.5, "text or a whole number", "1.5"),
        ("arm", ["plain"], "text or a whole number", '["plain"]'),
        ("finish", {"type": "stop"}, "text", '{"type": "stop"}'),
        ("finish", False, "text", "false"),
        ("logprob", [-1.0, -2.0], "a number", "[-1.0, -2.0]"),
        ("logprob", "low", "a number", '"low"'),
        ("logprob", "nan", "a number", '"nan"'),
        ("logprob", 10**400, "a finite number", "1" + "0" * 59),
        ("temperature", True, "a number", "true"),
        ("seed", 1.5, "a whole number", "1.5"),
        ("uniform", "yes", "true or false (or 1 or 0)", '"yes"'),
        ("propensity", "half", "a number", '"half"'),
        ("text", None, "text", "null"),
        ("text", ["a"], "text", '["a"]'),
        ("text", "\ud800", "text without half a character (a lone surrogate)", '"\ud800"'),
    ],
)
def test_anything_else_is_one_line(key: str, found: object, wanted: str, shown: str) -> None:
    write(question(id="b"), question({}, {key: found}))
    with pytest.raises(UserError) as error:
        list(read_questions(FILE))
    where = "in.jsonl:2: question 'a', trajectory 1"
    assert str(error.value) == f"{where}: field '{key}' must be {wanted}, found {shown}"


@pytest.mark.parametrize("tool", TOOLS)
def test_the_line_is_the_same_in_every_tool(tool: str) -> None:
    for key, found in {
        "tokens": "many",
        "id": 1.5,
        "finish": False,
        "temperature": [1],
        "text": None,
    }.items():
        write(question(id="b"), question({}, {key: found}))
        with pytest.raises(UserError) as error:
            list(read_questions(FILE))
        with pytest.raises(UserError) as own:
            TOOLS[tool]()
        assert str(own.value) == str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"id": None}, "in.jsonl:1: question None: field 'id' must be text or a whole number, found null"),
        (
            {"id": ["a\nb"]},
            "question ['a\\nb']: field 'id' must be text or a whole number, found [\"a\\nb\"]",
        ),
        ({"question": 7}, "question 'a': field 'question' must be text, found 7"),
        ({"gold": True}, "question 'a': field 'gold' must be text or a number, found true"),
        ({"solution": ["x"]}, "question 'a': field 'solution' must be text, found [\"x\"]"),
        ({"planted": "false"}, "field 'planted' must be true or false (or 1 or 0), found \"false\""),
        ({"trajectories": {"0": {}}}, "field 'trajectories' must be a list of objects, found {\"0\": {}}"),
        ({"trajectories": ["#### 10"]}, "'a', trajectory 0: an object is wanted, found \"#### 10\""),
        ({"trajectories": [{"id": 1}]}, "'a', trajectory 0: field 'text' is missing; fields found: 'id'"),
    ],
)
def test_a_question_is_typed_too(change: dict[str, Any], said: str) -> None:
    write(question(**change))
    with pytest.raises(UserError, match=re.escape(said)) as error:
        list(read_questions(FILE))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tool", TOOLS)
def test_an_id_that_is_there_twice_is_refused(tool: str) -> None:
    """5 and "5" are one id."""
    write(question(id=5), question(), question(id="5"))
    with pytest.raises(
        UserError, match=r"^in\.jsonl: lines 1 and 3 have the same id '5'; each may be there once"
    ):
        TOOLS[tool]()
    write(question({"id": 0}, {"id": "0"}))
    words = "^in.jsonl:1: question 'a', trajectory 1: an earlier one has the same id '0'; each needs its own$"
    with pytest.raises(UserError, match=words):
        TOOLS[tool]()


def test_ids_and_tokens_from_elsewhere_to_the_last_table() -> None:
    """Whole numbers as ids, the same ones in every question, and tokens as text and as ids: all tools go through."""
    rows = [{"id": 0, "tokens": "30"}, {"id": 1, "tokens": list(range(25))}]
    for row, text in zip(rows, (TEXTS[0], TEXTS[3]), strict=True):
        row["text"] = text
    write(*({"id": name, "question": QUESTION, "gold": 10.0, "trajectories": rows} for name in (7, 8)))
    TOOLS["coherence"]()
    assert [row["tokens"] for row in next(read_jsonl(SCORED))["trajectories"]] == [30, 25]
    preference.main(LAST_ROUND, SCORED, PAIRS, METRICS)
    assert [pair["id"] for pair in read_jsonl(PAIRS)] == ["7/0>1", "8/0>1"]
    assert read_json(METRICS)["length_difference"] == 5.0
    assert "0 > 1" in printed(explain.main, "8", SCORED)
    assert "30 (+5)" in printed(pairs.main, PAIRS, question="7")
    assert "0 of 2 questions" in printed(suspects.main, SCORED)


def test_without_gold_pairs_are_made_of_the_files_own_verdicts() -> None:
    record = question()
    del record["gold"]
    write(record)
    TOOLS["preference"]()
    assert [pair["id"] for pair in read_jsonl(PAIRS)] == ["a/0>1"]
    with pytest.raises(
        UserError, match=r"^in\.jsonl:1: question 'a': field 'gold' is missing; fields found: 'id'"
    ):
        TOOLS["coherence"]()
    with pytest.raises(UserError, match=r"^in\.jsonl: question 'a': its gold None is no number"):
        TOOLS["explain"]()
