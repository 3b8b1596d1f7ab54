"""coherence: the files it writes, the same bytes on any number of cores, and that a mistake costs no old output."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from stages import coherence
from stages.regime_w import scorer
from stages.run.errors import UserError
from stages.run.files import read_json, read_jsonl
from stages.run.paths import LAST_ROUND
from tests.regime_w.worked_example import QUESTION, TEXTS

REPO = Path(__file__).resolve().parents[1]
OUT, METRICS, PLOTS = Path("data/out.jsonl"), Path("metrics/regime_w.json"), Path("metrics/plots/regime_w")


def question(name: str, texts: list[str], **more: Any) -> dict[str, Any]:
    rest = {"logprob": -1.0, "finish": "stop", "seed": 1}
    trajectories = [
        {"id": f"{name}/{i}", "arm": f"arm{i}", "text": text, "tokens": 10 + i, **rest}
        for i, text in enumerate(texts)
    ]
    record = {
        "id": name,
        "question": QUESTION,
        "gold": "10",
        "solution": TEXTS[0],
        "trajectories": trajectories,
    }
    return {**record, **more}


def run(records: list[dict[str, Any]], cores: int = 1) -> list[dict[str, Any]]:
    scorer._scorer.cache_clear()  # a process scores with one scorer, these tests with several
    Path("in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    coherence.main(LAST_ROUND, Path("in.jsonl"), OUT, METRICS, PLOTS, cores)
    return list(read_jsonl(OUT))


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory with small parameters and the shipped scorer."""
    shutil.copytree(REPO / "tests" / "small", tmp_path, dirs_exist_ok=True)
    (tmp_path / "scorer.py").symlink_to(REPO / "stages" / "regime_w" / "signals.py")
    monkeypatch.chdir(tmp_path)


def test_worked_example_end_to_end() -> None:
    """The example of docs/regime-w.md through the whole stage: signals, verdicts, faults, reward, order of keys."""
    (record,) = run([question("q", TEXTS)])
    rows = record["trajectories"]
    assert [round(row["s_wm"], 6) for row in rows] == [0.644444, 0.644444, 0.622222, 0]
    assert [row["correct"] for row in rows] == [True, True, True, False]
    assert [row["soundness"] for row in rows] == ["sound", "sound", "lucky", None]
    assert [row["answer"] for row in rows] == ["10", "10", "10", "5"]
    assert [row["fault"] for row in rows] == [None] * 4
    assert rows[0]["reward"] == pytest.approx(1 + 0.5 * rows[0]["s_wm"])
    read = ["id", "question", "gold", "solution", "trajectories"]
    assert list(record) == [*read, *"s_end s_path s_cf s_wm suspicion suspect suspect_answer".split()]
    read = ["id", "arm", "text", "tokens", "logprob", "finish", "seed"]
    assert list(rows[0]) == [*read, *"answer correct fault soundness s_end s_path s_cf s_wm reward".split()]
    metrics = read_json(METRICS)
    assert metrics["equations"] == {"read": 8, "hold": 8, "skipped": 0}
    assert metrics["soundness"] == {"sound": 2, "lucky": 1, "unproven": 0}
    assert metrics["correct_over_wrong"]["s_wm"]["overall"] == {"auc": 1.0, "low": None, "high": None}
    assert metrics["sound_over_lucky"]["s_cf"]["auc"] == 1.0
    assert metrics["arms"]["arm0"]["regret"] == 0.0
    arms = (PLOTS / "arms.csv").read_text()
    assert arms.startswith("arm,mean_reward,low,high,pulls,best_share,regret\narm0,")
    assert "0.65,3,1.0\n" in (PLOTS / "coherence.csv").read_text()


def test_many_processes_give_the_same_bytes() -> None:
    records = [question(f"q{n}", TEXTS[n % 4 :] + TEXTS[: n % 4 + 1]) for n in range(300)]
    outputs = []
    for cores in (1, 2):
        run(records, cores)
        files = (OUT, METRICS, PLOTS / "arms.csv", PLOTS / "coherence.csv")
        outputs.append([path.read_bytes() for path in files])
    assert outputs[0] == outputs[1]
    assert len(outputs[0][0].splitlines()) == 300


@pytest.mark.parametrize("cores", [1, 2])
def test_a_mistake_leaves_the_old_output(cores: int) -> None:
    """In the records, or in a scorer of one's own; also when it is found in another process."""
    OUT.parent.mkdir()
    OUT.write_text("old\n")
    with pytest.raises(UserError, match="holds no questions"):
        run([], cores)
    with pytest.raises(UserError, match=r"in\.jsonl:1: question 'q7': field 'trajectories' must be a list"):
        run([question("q7", TEXTS, trajectories=None)], cores)
    Path("scorer.py").unlink()
    Path("scorer.py").write_text("def score_group(question, trajectories):\n    return 1 / 0\n")
    with pytest.raises(UserError, match="question 'q1': the scorer raised ZeroDivisionError"):
        run([question("q1", TEXTS)], cores)
    assert OUT.read_text() == "old\n"
    assert sorted(path.name for path in OUT.parent.iterdir()) == ["out.jsonl"]


def test_suspect_labels_are_counted() -> None:
    """Two planted labels, one of them found; one false alarm among three others."""
    agreeing = [TEXTS[0]] * 3 + [TEXTS[3]]
    records = [
        question("found", agreeing, gold="5", planted=True),
        question("missed", agreeing, planted=True),
        question("alarm", agreeing, gold="11"),
        question("fine", TEXTS),
        question("split", [TEXTS[0], TEXTS[3]], gold="5"),
    ]
    scored = {record["id"]: record for record in run(records)}
    assert (scored["found"]["suspicion"], scored["found"]["suspect"]) == (0.5, True)
    assert scored["found"]["suspect_answer"] == "10"
    assert (scored["alarm"]["suspicion"], scored["fine"]["suspicion"]) == (0.75, 0.0)
    assert (scored["split"]["suspect"], scored["split"]["suspect_answer"]) == (False, None)
    assert read_json(METRICS)["suspects"] == {
        "questions": 2, "planted": 2, "found": 1, "found_share": 0.5, "false_alarm_share": 1 / 3,
    }  # fmt: skip
