"""suspects: which questions are listed, in what order, with what evidence."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from stages import coherence
from stages.core.errors import UserError
from stages.core.records import read_json, write_jsonl
from stages.regime_w import signals
from stages.tools import suspects

SMALL = Path(__file__).resolve().parents[1] / "small"
QUESTION = "Ann has 3 bags of 4 apples and eats 2. How many apples are left?"
RIGHT = "<<3*4=12>>12\n<<12-2=10>>10\n#### 10"
OTHER_WAY = "<<4+4+4=12>>12\n<<12-2=10>>10\n#### 10"
UNSOUND = "<<3*4=13>>13\n<<13-3=10>>10\n#### 10"
WRONG = "<<3+4=7>>7\n<<7-2=5>>5\n#### 5"


def question(name: str, texts: list[str], suspicion: float, gold: str = "5", **more: Any) -> dict[str, Any]:
    """A question as the coherence stage writes it."""
    rows = [
        {"id": f"{name}/{i}", "text": text, "correct": text.endswith(f" {gold}")}
        for i, text in enumerate(texts)
    ]
    record = {"id": name, "question": QUESTION, "gold": gold, "solution": WRONG, "trajectories": rows}
    answer = "10" if suspicion else None
    return {**record, "s_wm": 0.5, "suspicion": suspicion, "suspect_answer": answer, **more}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five questions: two above 0.5, one at it, one below, one without suspicion."""
    shutil.copytree(SMALL, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    group = [OTHER_WAY, RIGHT, RIGHT, RIGHT]
    rows = [
        question("calm", [WRONG] * 4, 0.0),
        question("half", [RIGHT, RIGHT, UNSOUND, OTHER_WAY], 0.5, solution=None),
        question("most", [RIGHT] * 4, 1.0, solution="<<3*4=13>>13\n<<13-8=5>>5\n#### 5"),
        question("low", [RIGHT, RIGHT, WRONG, WRONG], 0.25),
        question("high", group, 0.75, solution="<<3*4=12>>12\n#### 5"),
    ]
    write_jsonl(Path("scored.jsonl"), rows)
    return Path("scored.jsonl")


def output(path: Path, width: int = 80, **options: Any) -> str:
    stream = io.StringIO()
    suspects.main(path, console=Console(file=stream, width=width, highlight=False), **options)
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= width
    return text


def listed(path: Path, limit: int = 20, threshold: float = 0.5) -> list[str]:
    return [row["id"] for row in suspects.find_suspects(path, limit, threshold)["listed"]]


def test_most_suspect_first(file: Path) -> None:
    """From the threshold on; never a question without any suspicion; of equals the earlier first."""
    assert listed(file) == ["most", "high", "half"]
    assert listed(file, threshold=0.0) == ["most", "high", "half", "low"]
    assert listed(file, limit=1) == ["most"] and listed(file, threshold=0.9) == ["most"]
    write_jsonl(file, [question(name, [RIGHT] * 4, 0.75) for name in "abcd"])
    assert listed(file, limit=3) == ["a", "b", "c"]


def test_threshold_comes_from_the_parameters(file: Path) -> None:
    assert output(file).startswith("3 of 5 questions have a suspicion of 0.5 or more\n")
    params = Path("params.yaml")
    params.write_text(params.read_text().replace("suspect_from: 0.5", "suspect_from: 0.8"))
    assert output(file).startswith("1 of 5 questions have a suspicion of 0.8 or more\n")
    assert output(file, threshold=0.2, limit=1).startswith(
        "4 of 5 questions have a suspicion of 0.2 or more; the first 1\n"
    )


def test_evidence(file: Path) -> None:
    """Who agrees soundly, who gives the gold, an agreeing solution, and the gold solution's own equations."""
    most, high, half = suspects.find_suspects(file, 20, 0.5)["listed"]
    assert (most["agree"], most["give_gold"], most["trajectories"]) == (4, 0, 4)
    assert most["gold_failing"] == [
        {
            "name": "e1",
            "written": "3*4=13",
            "linked": "m1*m2",
            "sources": ["m1", "m2"],
            "holds": False,
            "computed": "12",
        }
    ]
    assert high["agreeing"] == ["high/1", "high/2", "high/3"]  # the other way moves otherwise
    assert high["example"]["id"] == "high/1" and high["example"]["text"] == RIGHT
    assert high["gold_failing"] == [] and high["gold_carrier"] is None
    assert half["agree"] == 2 and half["gold_equations"] is None  # one does not hold, one goes another way


def test_printed(file: Path) -> None:
    text = " ".join(output(file).split())
    for words in (
        "most suspicion 1.000 gold 5, instead 10 Ann has 3 bags",
        "4 of 4 agree soundly on 10; 0 give 5",
        "gold solution: e1 3*4=13 does not hold (12)",
        "gold solution: none of its 1 equation gives 5",
        "the file has no gold solution",
        "high/1: <<3*4=12>>12 <<12-2=10>>10 #### 10",
    ):
        assert words in text
    assert "Planted" not in text
    low = " ".join(output(file, threshold=0.2).split())
    assert "low suspicion 0.250" in low and "2 of 4 agree soundly on 10; 2 give 5" in low
    assert "gold solution: its equations hold, and e2 gives 5" in low


def test_planted(file: Path) -> None:
    """Found and false alarms at the threshold, and over thresholds; counted over the whole file."""
    rows = [
        question(f"p{i}", [RIGHT] * 4, value, planted=True) for i, value in enumerate((1.0, 0.5, 0.25, 0.0))
    ]
    rows += [question(f"o{i}", [RIGHT] * 4, value, planted=False) for i, value in enumerate((0.75, 0.25))]
    rows += [question(f"n{i}", [RIGHT] * 4, 0.0) for i in range(8)]
    write_jsonl(file, rows)
    table = suspects.find_suspects(file, 1, 0.6)["planted"]
    assert [row["threshold"] for row in table] == [0.125, 0.25, 0.375, 0.5, 0.6, 0.625, 0.75, 0.875, 1.0]
    assert [row["found"] for row in table] == [3, 3, 2, 2, 1, 1, 1, 1, 1]
    assert [row["false_alarms"] for row in table] == [2, 2, 1, 1, 1, 1, 1, 0, 0]
    assert {(row["planted"], row["others"]) for row in table} == {(4, 10)}
    assert (table[3]["found_share"], table[3]["false_alarm_share"]) == (0.5, 0.1)
    text = output(file, limit=1)
    words = " ".join(text.split())
    assert (
        "Planted wrong labels found at 0.5: 2 of 4; false alarms among the others: 1 of 10 (10.0%)" in words
    )
    assert re.search(r"^ +> 0\.5 +2 of 4 +50\.0% +1 of 10 +10\.0%", text, re.MULTILINE)
    assert "p0  suspicion 1.000  gold 5, instead 10  planted" in text


def test_on_what_the_stage_writes(file: Path) -> None:
    """Scored by the coherence stage: the same count as in its metrics, the same answer, and all who agree."""
    params = Path("params.yaml")
    params.write_text(params.read_text().replace("scorer: scorer.py", f"scorer: {signals.__file__}"))
    groups = {"bad": [RIGHT, RIGHT, OTHER_WAY, WRONG], "odd": [RIGHT, OTHER_WAY, UNSOUND, UNSOUND]}
    groups |= {"worse": [RIGHT, RIGHT, RIGHT, "#### 7"], "good": [WRONG] * 4}
    rows = [question(name, texts, 0.0) for name, texts in groups.items()]
    write_jsonl(Path("in.jsonl"), [row | {"planted": row["id"] == "worse"} for row in rows])
    coherence.main(Path("in.jsonl"), Path("out.jsonl"), Path("m.json"), Path("plots"), processes=1)
    found = suspects.find_suspects(Path("out.jsonl"), 20, 0.5)
    counts = read_json(Path("m.json"))["suspects"]
    assert counts["questions"] == found["suspects"] == 1
    own = next(row for row in found["planted"] if row["threshold"] == 0.5)
    assert (counts["planted"], counts["found"]) == (own["planted"], own["found"]) == (1, 1)
    for row in suspects.find_suspects(Path("out.jsonl"), 20, 0.0)["listed"]:
        assert row["suspicion"] == (row["agree"] - row["give_gold"]) / row["trajectories"]
        assert row["answer"] == "10"
    assert listed(Path("out.jsonl"), threshold=0.0) == ["worse", "bad"]


def test_json(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suspects.main(file, threshold=0.6, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found == suspects.find_suspects(file, 20, 0.6)
    assert found["suspects"] == 2 and found["questions"] == 5 and found["planted"] is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"suspicion": None},
            "question 'x' has no suspicion; score the file with `python -m stages coherence`",
        ),
        ({"suspicion": "high"}, "question 'x' has no suspicion"),
        ({"suspicion": True}, "question 'x' has no suspicion"),
        ({"trajectories": [{"text": None}]}, "question 'x': trajectory 0 needs a field 'text'"),
        ({"trajectories": 7}, ":1: field 'trajectories' must be list"),
    ],
)
def test_bad_input(file: Path, change: dict[str, Any], words: str) -> None:
    write_jsonl(file, [question("x", [RIGHT] * 2, 1.0) | change])
    with pytest.raises(UserError) as error:
        output(file)
    assert str(error.value).startswith("scored.jsonl") and words in str(error.value)


def test_empty_and_missing_file(file: Path) -> None:
    Path("empty.jsonl").touch()
    with pytest.raises(UserError, match=r"empty\.jsonl: holds no questions; run `dvc repro coherence`"):
        output(Path("empty.jsonl"))
    with pytest.raises(UserError, match="cannot be read"):
        output(Path("none.jsonl"))
