"""coherence: the fields it writes, a replaceable scorer, the same bytes on any number of cores."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest

from stages import coherence
from stages.core.errors import UserError
from stages.core.records import read_json, read_jsonl

REPO = Path(__file__).resolve().parents[1]
REAL = REPO.parent / "shared" / "data" / "gsm8k" / "example_model_solutions.jsonl"
QUESTION = "Ann has 3 bags of 4 apples and eats 2. How many apples are left?"
TEXTS = [
    "<<3*4=12>>12 <<12-2=10>>10\n#### 10",
    "<<4*3=12>>12 <<12-2=10>>10\n#### 10",
    "<<4+4+4=12>>12 <<12-2=10>>10\n#### 10",
    "<<3+4=7>>7 <<7-2=5>>5\n#### 5",
]
OUT, METRICS, PLOTS = Path("data/out.jsonl"), Path("metrics/regime_w.json"), Path("metrics/plots/regime_w")


def question(name: str, texts: list[str], **more: Any) -> dict[str, Any]:
    trajectories = [
        {
            "id": f"{name}/{i}",
            "arm": f"arm{i}",
            "text": text,
            "tokens": 10 + i,
            "logprob": -1.0 - i,
            "finish": "stop",
            "seed": i,
        }
        for i, text in enumerate(texts)
    ]
    return {
        "id": name,
        "question": QUESTION,
        "gold": "10",
        "solution": TEXTS[0],
        "trajectories": trajectories,
        **more,
    }


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run(rollouts: Path, processes: int | None = 1) -> list[dict[str, Any]]:
    coherence.main(rollouts, OUT, METRICS, PLOTS, processes)
    return list(read_jsonl(OUT))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with small parameters and the shipped scorer."""
    shutil.copytree(REPO / "tests" / "small", tmp_path, dirs_exist_ok=True)
    (tmp_path / "scorer.py").symlink_to(REPO / "stages" / "regime_w" / "signals.py")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_worked_example_end_to_end(workplace: Path) -> None:
    """DESIGN's example through the whole stage: signals, verdicts, soundness, reward, key order."""
    (record,) = run(write(Path("in.jsonl"), [question("q", TEXTS)]))
    rows = record["trajectories"]
    assert [round(row["s_wm"], 6) for row in rows] == [0.644444, 0.644444, 0.622222, 0]
    assert [row["correct"] for row in rows] == [True, True, True, False]
    assert [row["soundness"] for row in rows] == ["sound", "sound", "lucky", None]
    assert [row["answer"] for row in rows] == ["10", "10", "10", "5"]
    assert rows[0]["reward"] == pytest.approx(1 + 0.5 * rows[0]["s_wm"])
    assert list(record) == [
        "id",
        "question",
        "gold",
        "solution",
        "trajectories",
        "s_end",
        "s_path",
        "s_cf",
        "s_wm",
        "suspicion",
        "suspect",
        "suspect_answer",
    ]
    scored = ["answer", "correct", "soundness", "s_end", "s_path", "s_cf", "s_wm", "reward"]
    assert list(rows[0]) == ["id", "arm", "text", "tokens", "logprob", "finish", "seed", *scored]
    metrics = read_json(METRICS)
    assert metrics["equations"] == {"read": 8, "hold": 8, "skipped": 0}
    assert metrics["soundness"] == {"sound": 2, "lucky": 1, "unproven": 0}
    assert metrics["correct_over_wrong"]["s_wm"]["overall"] == {"auc": 1.0, "low": None, "high": None}
    assert metrics["sound_over_lucky"]["s_cf"]["auc"] == 1.0
    assert metrics["arms"]["arm0"]["regret"] == 0.0
    assert (
        (PLOTS / "arms.csv").read_text().startswith("arm,mean_reward,low,high,pulls,best_share,regret\narm0,")
    )
    assert "0.65,3,1.0\n" in (PLOTS / "coherence.csv").read_text()


def test_scoring_its_own_output_again_changes_nothing(workplace: Path) -> None:
    run(write(Path("in.jsonl"), [question("q", TEXTS)]))
    first = OUT.read_bytes()
    shutil.copy(OUT, "again.jsonl")
    run(Path("again.jsonl"))
    assert OUT.read_bytes() == first


def test_a_next_problem_is_not_read(workplace: Path) -> None:
    """Equations after the answer belong to another problem."""
    leaking = TEXTS[0] + "\n\nQuestion:\nTom has 9 pens.\nAnswer:\n9+9 = 18\n#### 18"
    (record,) = run(write(Path("in.jsonl"), [question("q", [leaking, TEXTS[0]])]))
    assert [row["s_wm"] for row in record["trajectories"]] == [1.0, 1.0]


def test_optional_fields_may_be_absent(workplace: Path) -> None:
    record = {"id": "q", "question": QUESTION, "gold": 10, "trajectories": [{"text": text} for text in TEXTS]}
    (scored,) = run(write(Path("in.jsonl"), [record]))
    assert [row["id"] for row in scored["trajectories"]] == ["q/0", "q/1", "q/2", "q/3"]
    assert [row["soundness"] for row in scored["trajectories"]] == ["unproven", "unproven", "unproven", None]


def test_many_processes_give_the_same_bytes(workplace: Path) -> None:
    records = [question(f"q{n}", TEXTS[n % 4 :] + TEXTS[: n % 4 + 1]) for n in range(300)]
    rollouts = write(Path("in.jsonl"), records)
    outputs = []
    for processes in (1, 2):
        run(rollouts, processes)
        outputs.append(
            [path.read_bytes() for path in (OUT, METRICS, PLOTS / "arms.csv", PLOTS / "coherence.csv")]
        )
    assert outputs[0] == outputs[1]
    assert len(outputs[0][0].splitlines()) == 300


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (question("q7", TEXTS, gold="none"), "question 'q7': its gold 'none' is no number"),
        (
            question("q7", TEXTS, trajectories=[{"arm": "a"}]),
            "question 'q7': trajectory 0 needs a field 'text'",
        ),
        (question("q7", TEXTS, trajectories=None), "in.jsonl:1: field 'trajectories'"),
        (question("q7", ["\ud800"]), "question 'q7': cannot be written as JSON"),
    ],
)
def test_a_bad_record_is_named(workplace: Path, record: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(write(Path("in.jsonl"), [record]))
    assert not OUT.exists()


def test_no_questions_is_an_error(workplace: Path) -> None:
    with pytest.raises(UserError, match="holds no questions"):
        run(write(Path("in.jsonl"), []))


def test_suspect_labels_are_counted(workplace: Path) -> None:
    """Two planted labels, one of them found; one false alarm among three others."""
    agreeing = [TEXTS[0]] * 3 + [TEXTS[3]]
    records = [
        question("found", agreeing, gold="5", planted=True),
        question("missed", agreeing, planted=True),
        question("alarm", agreeing, gold="11"),
        question("fine", TEXTS),
        question("split", [TEXTS[0], TEXTS[3]], gold="5"),
    ]
    scored = {record["id"]: record for record in run(write(Path("in.jsonl"), records))}
    assert (scored["found"]["suspicion"], scored["found"]["suspect"]) == (0.5, True)
    assert scored["found"]["suspect_answer"] == "10"
    assert (scored["alarm"]["suspicion"], scored["fine"]["suspicion"]) == (0.75, 0.0)
    assert (scored["split"]["suspect"], scored["split"]["suspect_answer"]) == (False, None)
    assert read_json(METRICS)["suspects"] == {
        "questions": 2, "planted": 2, "found": 1, "found_share": 0.5, "false_alarm_share": 1 / 3,
    }  # fmt: skip


def test_overall_auc_interval_holds_what_it_promises() -> None:
    """Of 200 simulated files whose questions differ in level, about 95 in 100 intervals hold the true AUC."""
    rng = random.Random(5)
    truth = NormalDist().cdf(1 / math.sqrt(2 + 2 * 0.5))
    held = 0
    for _ in range(200):
        groups: dict[int, dict[float, list[int]]] = {}
        for question_number in range(200):
            level = rng.gauss(0, math.sqrt(0.5))
            counts = groups.setdefault(question_number % coherence.GROUPS, {})
            for k in range(8):
                value = round(rng.gauss(level + k % 2, 1), 3)
                counts.setdefault(value, [0, 0])[k % 2] += 1
        interval = coherence.overall_auc(groups)
        assert interval["low"] is not None and interval["high"] is not None
        held += interval["low"] <= truth <= interval["high"]
    assert 180 <= held <= 199


# ---- the replaceable scorer -----------------------------------------------------------------------

FLAT = "def score_group(question, trajectories):\n    k = len(trajectories)\n    flat = [{value}] * {size}\n"
FLAT += "    return dict(s_end=flat, s_path=flat, s_cf=flat, s_wm=flat)\n"


def replace_scorer(text: str) -> None:
    Path("scorer.py").unlink()
    Path("scorer.py").write_text(text)


def test_a_scorer_file_of_ones_own_is_used(workplace: Path) -> None:
    replace_scorer(FLAT.format(value=0.25, size="k"))
    (record,) = run(write(Path("in.jsonl"), [question("q", TEXTS)]))
    assert [row["s_wm"] for row in record["trajectories"]] == [0.25] * 4
    assert record["s_end"] == 0.25


def test_a_copy_of_the_shipped_scorer_gives_the_same_numbers(workplace: Path) -> None:
    rollouts = write(Path("in.jsonl"), [question("q", TEXTS)])
    first = run(rollouts)
    replace_scorer((REPO / "stages" / "regime_w" / "signals.py").read_text())
    assert run(rollouts, processes=2) == first


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (FLAT.format(value="1 / 0", size="k"), "question 'q1': the scorer raised ZeroDivisionError"),
        (FLAT.format(value=0.5, size="(k + 1)"), "question 'q1': s_end has 5 values for 4 trajectories"),
        (FLAT.format(value="float('nan')", size="k"), "question 'q1': s_end holds nan"),
        (FLAT.format(value=1.01, size="k"), "question 'q1': s_end holds 1.01"),
        (FLAT.format(value="'high'", size="k"), "question 'q1': s_end must be a list of numbers"),
        (
            "def score_group(question, trajectories):\n    return None\n",
            "question 'q1': s_end must be a list",
        ),
        ("x = 1\n", "has no function score_group"),
        ("import nothing_like_this\n", "cannot be loaded"),
    ],
)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_bad_scorer_stops_the_stage_and_leaves_the_old_output(
    workplace: Path, scorer: str, message: str, processes: int
) -> None:
    OUT.parent.mkdir()
    OUT.write_text("old\n")
    replace_scorer(scorer)
    with pytest.raises(UserError, match=message):
        run(write(Path("in.jsonl"), [question("q1", TEXTS)]), processes)
    assert OUT.read_text() == "old\n"
    assert sorted(path.name for path in OUT.parent.iterdir()) == ["out.jsonl"]


def test_a_missing_scorer_is_said(workplace: Path) -> None:
    Path("scorer.py").unlink()
    with pytest.raises(UserError, match=r"regime_w\.scorer: scorer\.py is not a file"):
        run(write(Path("in.jsonl"), [question("q1", TEXTS)]))
