"""explain: what is shown of one question is what was read and scored, at 80 columns too."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stages import coherence, preference
from stages.regime_w import signals
from stages.run.files import read_jsonl, write_jsonl
from stages.run.params import load_params
from stages.run.paths import LAST
from stages.tools import explain
from tests.tools.screen import printed, words

SMALL = Path(__file__).resolve().parents[1] / "small"
QUESTION = "Ann has 3 bags of 4 apples and eats 2. How many apples are left?"
SOLUTION = "<<3*4=12>>12 apples.\n<<12-2=10>>10\n#### 10"
TEXTS = [
    "<<3*4=12>>12 <<12-2=10>>10\n#### 10",
    "<<3*4=12>>12 <<12-2=10>>10\n#### 10",
    "<<4+4+4=12>>12 <<12-2=10>>10\n#### 10",
    "<<3*4=13>>13 <<13-2=11>>11\n#### 11",
    "I think 10.\n#### 10\nQuestion: Bob has 7 pens.",
]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tests' own parameters with the shipped scorer, and three scored questions."""
    folder = tmp_path_factory.mktemp("scored")
    shutil.copytree(SMALL, folder, dirs_exist_ok=True)
    params = folder / "params.yaml"
    params.write_text(params.read_text().replace("scorer: scorer.py", f"scorer: {signals.__file__}"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        records = [
            question("ann", TEXTS, 600),
            question("bob-17", TEXTS[3:4] * 2, 5),
            question("all", TEXTS[:2], 5),
        ]
        write_jsonl(LAST.rollouts, records)
        coherence.main(cores=1)
    return folder


@pytest.fixture
def workplace(scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that is a copy of it."""
    shutil.copytree(scored, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def question(name: str, texts: list[str], tokens: int) -> dict[str, Any]:
    rows = [
        {"id": f"{name}/{i}", "arm": f"arm{i}", "text": text, "tokens": tokens, "finish": "stop"}
        for i, text in enumerate(texts)
    ]
    return {"id": name, "question": QUESTION, "gold": "10", "solution": SOLUTION, "trajectories": rows}


def picture(name: str = "ann", rollouts: Path = LAST.scored) -> dict[str, Any]:
    return explain.explain(explain.find_question([rollouts], name)[1], rollouts, load_params())


def output(name: str = "ann", **options: Any) -> str:
    return printed(explain.main, name, **options)


def test_equations_and_links(workplace: Path) -> None:
    """Each operand comes from an earlier equation, a number of the question, or nowhere."""
    found = picture()
    assert found["numbers"] == {"m1": "3", "m2": "4", "m3": "2"}
    first, third, wrong, bare = (found["trajectories"][i] for i in (0, 2, 3, 4))
    assert [(e["name"], e["written"], e["linked"]) for e in first["equations"]] == [
        ("e1", "3*4=12", "m1*m2"),
        ("e2", "12-2=10", "e1-m3"),
    ]
    assert first["carrier"] == "e2"
    assert third["equations"][0]["linked"] == "m2+m2+m2"
    assert [(e["holds"], e["computed"]) for e in wrong["equations"]] == [(False, "12"), (True, "11")]
    assert bare["equations"] == [] and bare["carrier"] is None


def test_counterfactuals_and_their_marks(workplace: Path) -> None:
    """What each number moves, where it agrees with most and with the gold; undefined once a step fails."""
    rows = picture()["trajectories"]
    values = [[move["value"] for move in row["counterfactuals"]] for row in rows]
    assert values == [["14", "13", "9"]] * 2 + [["10", "13", "9"], [None] * 3, [None] * 3]
    assert [move["gold"] for move in rows[2]["counterfactuals"]] == [False, True, True]
    assert [move["majority"] for move in rows[2]["counterfactuals"]] == [False, True, True]
    assert rows[0]["soundness"] == "sound" and rows[2]["soundness"] == "lucky"
    two = signals.analyse_group(QUESTION, [{"text": TEXTS[i], "answer": "10"} for i in (0, 2)]).reasonings
    assert list(explain.majorities(two)) == [set(), {13}, {9}]  # one against one is no majority


def test_parts_add_up_to_the_reward(workplace: Path) -> None:
    """Four parts, with the length beyond the limit taken off, and gamma where all agree."""
    for row in picture()["trajectories"]:
        parts = row["reward_parts"]
        assert sum(parts.values()) == pytest.approx(row["reward"], abs=1e-12)
        assert parts["correct"] == (1.0 if row["correct"] else 0.0)
        assert parts["coherence"] == pytest.approx(0.5 * row["s_wm"])
        assert parts["length"] == pytest.approx(-0.088) and parts["consensus"] == 0.0
        assert "other" not in parts
    parts = picture("all")["trajectories"][0]["reward_parts"]
    assert parts == {"correct": 1.0, "coherence": 0.5, "consensus": 0.2, "length": 0.0}


def test_scores_are_the_files_own(workplace: Path) -> None:
    """A private scorer or other parameters may have made them; what params.yaml cannot explain is named."""
    record = next(read_jsonl(LAST.scored))
    record["trajectories"][0]["s_wm"] = 0.125
    write_jsonl(Path("mine.jsonl"), [record])
    assert picture("ann", Path("mine.jsonl"))["trajectories"][0]["s_wm"] == 0.125
    params = Path("params.yaml")
    params.write_text(params.read_text().replace("alpha: 1.0", "alpha: 3.0"))
    row = picture()["trajectories"][0]
    assert row["reward_parts"]["other"] == pytest.approx(-2.0)
    assert sum(row["reward_parts"].values()) == pytest.approx(row["reward"])
    text = output()
    assert re.search(r"  other +-2\.000", text) and "other: what params.yaml does not explain" in words(text)


@pytest.mark.parametrize(("width", "tables"), [(50, 3), (80, 2), (120, 1), (200, 1)])
def test_printed(workplace: Path, width: int, tables: int) -> None:
    """Gold and trajectories side by side, as many as fit; like ones share a column."""
    text = output(width=width)
    headings = [line.split() for line in text.splitlines() if re.fullmatch(r" +(gold|[0-9])[ 0-9]*", line)]
    assert [word for line in headings for word in line] == ["gold", "0", "1", "2", "3", "4"]
    assert len(headings) == tables
    lines = [re.sub(r" {2,}", "  ", line).strip() for line in text.splitlines()]
    for part in ("e1 3*4=13 ✗ 12", "e2 12-2=10 <", "m2+m2+m2", "14 MG", "11 ✗", "10 ✓", "?", "arm0 arm1"):
        assert any(part in line for line in lines), part
    assert any(line.startswith("m1 3→4") for line in lines)
    assert any(line.startswith("fault") and "leaking" in line for line in lines)
    assert "I think 10." not in text
    text = output(width=width, text=True)
    assert "I think 10." in text and "Question: Bob has 7 pens." in words(text)


def test_pairs_and_why_not_more(workplace: Path) -> None:
    """What params.yaml makes of the question, and the reasons by their names in metrics/preference/."""
    made = picture()["pairs"]
    assert [pair["chosen_id"] for pair in made["coherence"]["made"]] == ["ann/0"]
    text = output()
    total = len(made["coherence"]["made"]) + len(made["correctness"]["made"])
    assert f"Pairs from this question, by params.yaml: {total}\n" in text
    assert re.search(r"coherence +0 > 4 +0\.\d{3} +600 > 600", text)
    assert "correctness, not made: leaking 1" in words(text)
    assert "coherence, not made: identical 1, margin 2, repeated 1, question_limit 1" in words(text)
    text = output("bob-17")
    assert "No pairs from this question" in text
    assert "correctness, not made: all trajectories are wrong" in text
    assert "coherence, not made: fewer than two trajectories are right" in text


def test_file_from_elsewhere(workplace: Path) -> None:
    """Without any optional field: read, and said to be without scores."""
    rows = [{"text": text} for text in TEXTS]
    record = {"id": "x", "question": "How many?", "gold": 10, "trajectories": rows}
    write_jsonl(Path("raw.jsonl"), [record])
    found = picture("x", Path("raw.jsonl"))
    assert [row["correct"] for row in found["trajectories"]] == [True, True, True, False, True]
    assert found["trajectories"][0]["counterfactuals"][0]["value"] == "10"
    assert found["trajectories"][0]["reward_parts"] is None and found["pairs"] is None
    text = output("x", rollouts=Path("raw.jsonl"))
    assert "score the file with `python -m stages coherence`" in text and "unchanged" in text
    assert "no number in digits" in text
    write_jsonl(Path("raw.jsonl"), [{**record, "trajectories": []}])
    assert "0 of 0 right" in output("x", rollouts=Path("raw.jsonl"))


@pytest.mark.parametrize(
    ("text", "written", "linked"),
    [
        ("<<(3+4)*2=14>>", "(3+4)*2=14", "(m1+m2)*m3"),
        ("<<10-(3-4)=11>>", "10-(3-4)=11", "10-(m1-m2)"),
        ("<<10-3-4=3>>", "10-3-4=3", "10-m1-m2"),
        ("<<12/(3*2)=2>>", "12/(3*2)=2", "12/(m1*m3)"),
        ("<<3*(4+2)*2=36>>", "3*(4+2)*2=36", "m1*(m2+m3)*m3"),
        ("<<50*4%=2>>", "50*4%=2", "50*m2%"),
        ("<<-3+4=1>>", "-3+4=1", "-m1+m2"),
        ("<<4*-3=-12>>", "4*(-3)=-12", "m2*(-m1)"),
        ("<<-(3+4)=-7>>", "-(3+4)=-7", "-(m1+m2)"),
    ],
)
def test_expressions_are_written_as_they_count(text: str, written: str, linked: str) -> None:
    reasoning = signals.analyse_group(QUESTION, [{"text": text, "answer": None}]).reasonings[0]
    (equation,) = explain.reasoning_rows(reasoning, [], None)["equations"]
    assert (equation["written"], equation["linked"]) == (written, linked)
    again = signals.analyse_group(QUESTION, [{"text": f"<<{written}>>", "answer": None}]).reasonings[0]
    assert again.solution.equations[0].computed == reasoning.solution.equations[0].computed


def test_command_line(workplace: Path) -> None:
    """The tools that show records answer without torch; a wrong id is one line and exit status 1."""
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1))\nfrom stages.__main__ import main\n"
        "try: main()\nfinally: assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    repo = Path(__file__).resolve().parents[2]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, repo, *arguments], capture_output=True, text=True)

    assert json.loads(run("explain", "ann", "--json").stdout) == picture()
    preference.main()
    assert re.search(r"\(1 of 1, \d in all\)", run("pairs", "--sample", "1").stdout)
    assert run("suspects", "--from", "0.25").stdout.startswith("0 of 3 questions have a suspicion of 0.25 or")
    assert "training question" in run("trace", "ann").stdout
    wrong = run("explain", "anne")
    assert wrong.returncode == 1 and wrong.stdout == ""
    assert wrong.stderr.startswith(
        "error: data/regime_w_rollouts/dpo.jsonl: no question 'anne'; the nearest ids are"
    )
    assert wrong.stderr.count("\n") == 1
