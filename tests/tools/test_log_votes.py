"""grade --vote and compare --vote: samples of logs from anywhere vote by their coherence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from stages.run.errors import UserError
from stages.stats.paired import paired_rates
from stages.tools import compare, grade
from stages.tools.grade import FieldNames
from tests.regime_w.worked_example import QUESTION, TEXTS
from tests.tools.screen import printed, words

REPO = Path(__file__).resolve().parents[2]
SLIP = "<<3*4=12>>12 <<12-2=11>>11\n#### 11"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(REPO / "tests" / "small", tmp_path, dirs_exist_ok=True)
    (tmp_path / "scorer.py").symlink_to(REPO / "stages" / "regime_w" / "signals.py")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def log(name: str, records: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return name


def record(i: int, texts: list[str], **more: Any) -> dict[str, Any]:
    return {"id": f"q{i}", "q": QUESTION, "gold": 10, "completion": texts[0], "drawn": texts, **more}


NAMES = FieldNames(question="q", samples="drawn")
WRONG, RIGHT = [SLIP] * 3 + TEXTS[:2], TEXTS[:3] + [SLIP] * 2


def test_samples_of_a_log_vote(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = log("log.jsonl", [record(i, WRONG) for i in range(10)])
    shown = words(printed(grade.main, [file], NAMES, vote="s_cf"))
    assert "vote of 5 samples, majority: 0.0 % (0.0–0.0)" in shown
    assert "vote of 5 samples, by s_cf: 100.0 % (100.0–100.0)" in shown
    assert "against the majority: +100.0 points (+100.0 to +100.0), p = 0.002; shuffled " in shown
    assert "vote: coherence is better (p = 0.002)" in shown
    grade.main([file], NAMES, vote="s_end", as_json=True)
    votes = json.loads(capsys.readouterr().out)["votes"]
    assert (votes["vote"], votes["coherent_at_5"]) == ("s_end", 0.0)
    assert votes["by"]["s_cf"]["accuracy"] == 1.0


def test_samples_may_be_texts_or_objects_under_any_name(workplace: Path) -> None:
    for drawn in (WRONG, [WRONG], [{"completion": text, "tokens": 9} for text in WRONG]):
        row = grade.grade(record(1, WRONG) | {"drawn": drawn}, NAMES)
        assert [sample["answer"] for sample in row["samples"]] == ["11"] * 3 + ["10"] * 2
    assert "samples" not in grade.grade(record(1, WRONG), FieldNames())
    for drawn in ([1, 2], [{"text": "x"}]):
        with pytest.raises(ValueError, match="field 'drawn' must be a list of texts, or of objects with"):
            grade.grade(record(1, WRONG) | {"drawn": drawn}, NAMES)


def test_what_the_vote_needs_is_named(workplace: Path) -> None:
    one = log("log.jsonl", [record(1, WRONG)])
    with pytest.raises(UserError, match=r"log\.jsonl:1: the vote needs the question's text; name its field"):
        grade.main([one], FieldNames(samples="drawn"), vote="s_cf")
    with pytest.raises(UserError, match=r"log\.jsonl:1: no samples, so there is nothing to vote on"):
        grade.main([one], FieldNames(question="q"), vote="s_cf")
    with pytest.raises(UserError, match=r"question 'q1': a sample has no 'logprob'"):
        grade.main([one], NAMES, vote="both")


def test_two_logs_are_compared_by_what_they_elect(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {"a": [WRONG] * 9 + [[SLIP] * 5] * 3, "b": [RIGHT] * 9 + [WRONG] * 3}
    for name, groups in texts.items():
        file = log(f"{name}.log", [record(i, group) for i, group in enumerate(groups)])
        printed(grade.main, [file], NAMES, out=Path(f"{name}.jsonl"))
    compare.main(Path("a.jsonl"), Path("b.jsonl"), as_json=True, vote="s_cf")
    made = json.loads(capsys.readouterr().out)
    want = paired_rates([1.0] * 9 + [0.0] * 3, [1.0] * 12, ("a", "b"))
    assert {key: made[f"coherent_{key}"] for key in want} == want
    assert (made["vote"], made["coherent_a"], made["coherent_b"]) == ("s_cf", 0.75, 1.0)
    shown = words(printed(compare.main, Path("a.jsonl"), Path("b.jsonl"), vote="s_cf"))
    assert "voted by s_cf 75.0 % 100.0 % +25.0 0.25" in shown
    assert "voted by s_cf: no difference can be seen; one of at least" in shown
    assert "voted" not in printed(compare.main, Path("a.jsonl"), Path("b.jsonl"))


def test_compare_names_the_line_it_cannot_weigh(workplace: Path) -> None:
    log("a.jsonl", [{"id": 1, "correct": True, "question": QUESTION, "samples": []}])
    with pytest.raises(UserError, match=r"a\.jsonl:1: no samples, so there is nothing to vote on"):
        compare.main(Path("a.jsonl"), Path("a.jsonl"), vote="s_cf")
    log("a.jsonl", [{"id": 1, "correct": True, "question": QUESTION, "samples": [{"correct": True}]}])
    with pytest.raises(UserError, match=r"a\.jsonl:1: a sample has no graded 'completion'; run"):
        compare.main(Path("a.jsonl"), Path("a.jsonl"), vote="s_cf")
