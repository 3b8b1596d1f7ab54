"""suspects: which questions are listed, in what order, with what evidence."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from stages.run.errors import UserError
from stages.run.files import write_jsonl
from stages.tools import suspects
from tests.tools.screen import printed, words

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
    rows = [
        question("calm", [WRONG] * 4, 0.0),
        question("half", [RIGHT, UNSOUND, UNSOUND, OTHER_WAY], 0.5, solution=None),
        question("most", [RIGHT] * 4, 1.0, solution="<<3*4=13>>13\n<<13-8=5>>5\n#### 5"),
        question("low", [RIGHT, RIGHT, WRONG, WRONG], 0.25),
        question("high", [OTHER_WAY, RIGHT, RIGHT, RIGHT], 0.75, solution="<<3*4=12>>12\n#### 5"),
    ]
    write_jsonl(Path("scored.jsonl"), rows)
    return Path("scored.jsonl")


def listed(path: Path, **options: Any) -> list[str]:
    return re.findall(r"^(\S+)  suspicion", printed(suspects.main, path, **options), re.MULTILINE)


def test_most_suspect_first(file: Path) -> None:
    """From the threshold on; never a question without any suspicion; of equals the earlier first."""
    assert listed(file) == ["most", "high", "half"]
    assert listed(file, threshold=0.0) == ["most", "high", "half", "low"]
    assert listed(file, limit=1) == ["most"] and listed(file, threshold=0.9) == ["most"]
    write_jsonl(file, [question(name, [RIGHT] * 4, 0.75) for name in "abcd"])
    assert listed(file, limit=3) == ["a", "b", "c"]


def test_threshold_comes_from_the_parameters(file: Path) -> None:
    assert printed(suspects.main, file).startswith("3 of 5 questions have a suspicion of 0.5 or more\n")
    params = Path("params.yaml")
    params.write_text(params.read_text().replace("suspect_from: 0.5", "suspect_from: 0.8"))
    assert printed(suspects.main, file).startswith("1 of 5 questions have a suspicion of 0.8 or more\n")
    text = printed(suspects.main, file, threshold=0.2, limit=1)
    assert text.startswith("4 of 5 questions have a suspicion of 0.2 or more; the first 1\n")


def test_evidence(file: Path) -> None:
    """Who agrees soundly, who gives the gold, an agreeing solution, and the gold solution's own equations."""
    text = words(printed(suspects.main, file))
    for part in (
        "most suspicion 1.000 gold 5, instead 10 Ann has 3 bags",
        "4 of 4 agree soundly on 10; 0 give 5 gold solution: e1 3*4=13 does not hold (12) most/0:",
        # The other way moves otherwise.
        "3 of 4 agree soundly on 10; 0 give 5 gold solution: none of its equations gives 5",
        "high/1: <<3*4=12>>12 <<12-2=10>>10 #### 10",
        # Two of the four do not hold, and one goes another way.
        "1 of 4 agree soundly on 10; 0 give 5 the file has no gold solution",
    ):
        assert part in text, part
    assert "planted" not in text
    low = words(printed(suspects.main, file, threshold=0.2))
    assert "low suspicion 0.250" in low
    assert "2 of 4 agree soundly on 10; 2 give 5 gold solution: its equations hold, and e2 gives 5" in low


def test_planted(file: Path) -> None:
    """Found and false alarms at each threshold; counted over the whole file."""
    planted = (1.0, 0.5, 0.25, 0.0)
    rows = [question(f"p{i}", [RIGHT] * 4, value, planted=True) for i, value in enumerate(planted)]
    rows += [question(f"o{i}", [RIGHT] * 4, value, planted=False) for i, value in enumerate((0.75, 0.25))]
    rows += [question(f"n{i}", [RIGHT] * 4, 0.0) for i in range(8)]
    write_jsonl(file, rows)
    text = printed(suspects.main, file, limit=1, threshold=0.6)
    table = re.findall(r"^ +(?:> )?([\d.]+) +(\d) of 4 \(.+?\) +(\d) of 10 \(.+?\) *$", text, re.MULTILINE)
    values = "0.125 0.25 0.375 0.5 0.6 0.625 0.75 0.875 1".split()
    assert table == list(zip(values, "332211111", "221111100", strict=True))
    assert re.search(r"^ +> 0\.6 +1 of 4 \(25\.0%\) +1 of 10 \(10\.0%\)", text, re.MULTILINE)
    assert "p0  suspicion 1.000  gold 5, instead 10  planted" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"suspicion": None}, "'x' has no suspicion; score the file with `python -m stages coherence`"),
        ({"suspicion": True}, ":1: question 'x': field 'suspicion' must be a number, found true"),
        ({"gold": "ten"}, "question 'x': its gold 'ten' is no number"),
    ],
)
def test_bad_input(file: Path, change: dict[str, Any], said: str) -> None:
    write_jsonl(file, [question("x", [RIGHT] * 2, 1.0) | change])
    with pytest.raises(UserError) as error:
        suspects.main(file)
    assert str(error.value).startswith("scored.jsonl") and said in str(error.value)
    file.write_text("")
    with pytest.raises(UserError, match=r"scored\.jsonl: holds no questions; run `dvc repro`"):
        suspects.main(file)
