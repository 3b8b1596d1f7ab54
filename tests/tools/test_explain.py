"""explain: what is shown of one question is what was read and scored, at 80 columns too."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from stages import coherence, preference
from stages.core.errors import UserError
from stages.core.params import load_params
from stages.core.records import read_json, read_jsonl, write_json, write_jsonl
from stages.regime_w import signals
from stages.tools import explain

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
    """The tests' own parameters with the shipped scorer, and two scored questions with their pairs."""
    folder = tmp_path_factory.mktemp("scored")
    shutil.copytree(SMALL, folder, dirs_exist_ok=True)
    params = folder / "params.yaml"
    params.write_text(params.read_text().replace("scorer: scorer.py", f"scorer: {signals.__file__}"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        records = [question("ann", TEXTS, tokens=600), question("bob-17", TEXTS[3:4] * 2, tokens=5)]
        write_jsonl(Path("data/rollouts.jsonl"), records)
        coherence.main(processes=1)
        preference.main()
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


def picture(
    name: str = "ann", rollouts: Path = explain.ROLLOUTS, pairs: Path | None = None
) -> dict[str, Any]:
    return explain.explain(explain.find_question(rollouts, name), rollouts, pairs, load_params())


def output(width: int = 80, name: str = "ann", **options: Any) -> str:
    stream = io.StringIO()
    explain.main(name, console=Console(file=stream, width=width, highlight=False), **options)
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= width
    return text


def test_equations_and_links(workplace: Path) -> None:
    """Each operand comes from an earlier equation, a number of the question, or nowhere."""
    found = picture()
    assert found["numbers"] == {"m1": "3", "m2": "4", "m3": "2"}
    first, third, wrong = (found["trajectories"][i] for i in (0, 2, 3))
    assert [(e["name"], e["written"], e["linked"]) for e in first["equations"]] == [
        ("e1", "3*4=12", "m1*m2"),
        ("e2", "12-2=10", "e1-m3"),
    ]
    assert first["carrier"] == "e2"
    assert third["equations"][0]["sources"] == ["m2", "m2", "m2"]
    assert [(e["holds"], e["computed"]) for e in wrong["equations"]] == [(False, "12"), (True, "11")]
    assert found["trajectories"][4]["equations"] == [] and found["trajectories"][4]["carrier"] is None


def test_counterfactuals_and_their_marks(workplace: Path) -> None:
    """What each number moves, where it agrees with most and with the gold; undefined once a step fails."""
    rows = picture()["trajectories"]
    values = [[move["value"] for move in row["counterfactuals"]] for row in rows]
    assert values == [["14", "13", "9"]] * 2 + [["10", "13", "9"], [None] * 3, [None] * 3]
    assert [move["gold"] for move in rows[2]["counterfactuals"]] == [False, True, True]
    assert [move["majority"] for move in rows[2]["counterfactuals"]] == [False, True, True]
    assert [move["stays"] for move in rows[2]["counterfactuals"]] == [True, False, False]
    assert rows[0]["soundness"] == "sound" and rows[2]["soundness"] == "lucky"


def test_parts_add_up_to_the_reward(workplace: Path) -> None:
    """Four parts, with the length beyond the limit taken off."""
    for row in picture()["trajectories"]:
        parts = row["reward_parts"]
        assert sum(parts.values()) == pytest.approx(row["reward"], abs=1e-12)
        assert parts["correct"] == (1.0 if row["correct"] else 0.0)
        assert parts["coherence"] == pytest.approx(0.5 * row["s_wm"])
        assert parts["length"] == pytest.approx(-0.088) and parts["consensus"] == 0.0
        assert "other" not in parts


def test_consensus_is_a_part(workplace: Path) -> None:
    """A question all trajectories agree on pays gamma to the correct ones."""
    write_jsonl(Path("in.jsonl"), [question("all", TEXTS[:2], tokens=5)])
    coherence.main(Path("in.jsonl"), Path("all.jsonl"), Path("m.json"), Path("plots"), processes=1)
    parts = picture("all", Path("all.jsonl"))["trajectories"][0]["reward_parts"]
    assert parts == {"correct": 1.0, "coherence": 0.5, "consensus": 0.2, "length": 0.0}


def test_parameters_are_those_the_file_was_made_with(workplace: Path) -> None:
    """The manifest beside the file says them; without it, what params.yaml cannot explain is named."""
    params = Path("params.yaml")
    params.write_text(params.read_text().replace("alpha: 1.0", "alpha: 3.0"))
    assert picture()["reward_params_from"] == "data/regime_w_rollouts.manifest.json"
    assert "other" not in picture()["trajectories"][0]["reward_parts"]
    Path("data/regime_w_rollouts.manifest.json").unlink()
    row = picture()["trajectories"][0]
    assert row["reward_parts"]["other"] == pytest.approx(-2.0)
    assert sum(row["reward_parts"].values()) == pytest.approx(row["reward"])
    text = output()
    assert re.search(r"  other +-2\.000", text) and "the parameters in params.yaml do not explain" in text


def test_signals_are_the_files_own(workplace: Path) -> None:
    """A private scorer may have made them: they are shown, not made again."""
    record = next(read_jsonl(explain.ROLLOUTS))
    record["trajectories"][0]["s_wm"] = 0.125
    write_jsonl(Path("mine.jsonl"), [record])
    assert picture("ann", Path("mine.jsonl"))["trajectories"][0]["s_wm"] == 0.125


@pytest.mark.parametrize("width", [50, 80, 120, 200])
def test_printed(workplace: Path, width: int) -> None:
    """Gold and trajectories side by side, as many as fit; like ones share a column."""
    text = output(width)
    headings = [line.split() for line in text.splitlines() if re.fullmatch(r" +(gold|[0-9])[ 0-9]*", line)]
    assert [word for line in headings for word in line] == ["gold", "0", "1", "2", "3", "4"]
    assert len(headings) == {50: 3, 80: 2, 120: 1, 200: 1}[width]
    lines = [re.sub(r" {2,}", "  ", line).strip() for line in text.splitlines()]
    for words in ("e1 3*4=13 ✗ 12", "e2 12-2=10 <", "m2+m2+m2", "10 stays", "14 MG", "11 ✗", "10 ✓", "?"):
        assert any(words in line for line in lines), words
    assert any(line.startswith("m1 3→4") for line in lines)
    assert any(line.startswith("not read") for line in lines)
    assert " ".join(text.split()).count("26 characters after") == 1  # the next problem it began


def test_text_only_when_asked(workplace: Path) -> None:
    assert "I think 10." not in output()
    text = output(text=True)
    assert "I think 10." in text and "Question: Bob has 7 pens." in text


def test_pairs(workplace: Path) -> None:
    """Those of the file, and why other candidates gave none."""
    found = picture()
    made = [pair for pair in read_jsonl(explain.PAIRS) if pair["question_id"] == "ann"]
    assert [(p["chosen_id"], p["rejected_id"], p["margin"]) for p in found["pairs"]] == [
        (p["chosen_id"], p["rejected_id"], p["margin"]) for p in made
    ]
    assert {pair["kind"] for pair in made} == {"correctness", "coherence"}
    text = output()
    assert f"{len(made)} pairs from this question" in text
    assert re.search(r"coherence +0 > 4 +0\.\d{3} +600 > 600", text)
    lines = " ".join(text.split())
    assert "correctness, not made: the better one goes on into another problem (1)" in lines
    assert (
        "coherence, not made: the same text (1)" in lines and "enough pairs from this question (1)" in lines
    )


def test_no_pair_and_why(workplace: Path) -> None:
    text = output(name="bob-17")
    assert "No pairs from this question" in text
    assert "correctness, not made: all trajectories are wrong" in text
    assert "coherence, not made: fewer than two trajectories are right" in text


def test_pairs_of_another_file_are_not_mixed_in(workplace: Path) -> None:
    """A file from elsewhere gets the pairs that params.yaml would make, until its own are named."""
    record = next(read_jsonl(explain.ROLLOUTS))
    write_jsonl(Path("mine.jsonl"), [record])
    assert picture("ann", Path("mine.jsonl"))["pairs_from"] == "params.yaml"
    assert "pairs from this question, as params.yaml would have it" in output(rollouts=Path("mine.jsonl"))
    write_jsonl(Path("pairs.jsonl"), [])
    text = " ".join(output(rollouts=Path("mine.jsonl"), pairs=Path("pairs.jsonl")).split())
    assert "No pairs from this question" in text and "params.yaml would give 2" in text


def test_file_from_elsewhere(workplace: Path) -> None:
    """Raw trajectories without any optional field: read, and said to be without scores."""
    rows = [{"text": text} for text in TEXTS]
    record = {"id": "x", "question": "How many?", "gold": 10, "trajectories": rows}
    write_jsonl(Path("raw.jsonl"), [record])
    found = picture("x", Path("raw.jsonl"))
    assert [row["correct"] for row in found["trajectories"]] == [True, True, True, False, True]
    assert found["trajectories"][0]["counterfactuals"][0]["value"] == "10"
    assert found["trajectories"][0]["reward_parts"] is None and found["pairs"] is None
    text = output(name="x", rollouts=Path("raw.jsonl"))
    assert "score the file with `python -m stages coherence`" in text and "unchanged" in text
    assert "no number in digits" in text
    write_jsonl(Path("raw.jsonl"), [{**record, "trajectories": []}])
    assert "0 of 0 right" in output(name="x", rollouts=Path("raw.jsonl"))


def test_json(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    explain.main("ann", as_json=True)
    assert json.loads(capsys.readouterr().out) == picture()


def test_wrong_id_names_the_nearest(workplace: Path) -> None:
    with pytest.raises(UserError) as error:
        picture("17")
    assert str(error.value) == (
        "data/regime_w_rollouts.jsonl: no question '17'; the nearest ids are bob-17, ann"
    )
    with pytest.raises(UserError, match=r"none\.jsonl: cannot be read"):
        picture("17", Path("none.jsonl"))
    Path("empty.jsonl").touch()
    with pytest.raises(UserError, match=r"empty\.jsonl: holds no questions"):
        picture("17", Path("empty.jsonl"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gold": "many"}, "its gold 'many' is no number"),
        ({"s_wm": "high"}, "field 's_wm' must be a number, found 'high'"),
        ({"trajectories": [{"text": 3}]}, "trajectory 0 needs a field 'text'"),
        (
            {"trajectories": [{"text": "", "tokens": True}]},
            "field 'tokens' must be a whole number, found True",
        ),
        ({"trajectories": [{"text": "", "correct": 1}]}, "field 'correct' must be true or false, found 1"),
    ],
)
def test_bad_fields(workplace: Path, change: dict[str, Any], words: str) -> None:
    """One line with file, question and field."""
    write_jsonl(Path("bad.jsonl"), [{**question("ann", TEXTS, 5), **change}])
    with pytest.raises(UserError) as error:
        picture("ann", Path("bad.jsonl"))
    assert str(error.value).startswith("bad.jsonl: question 'ann'") and words in str(error.value)


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
    trace = signals.analyse_group(QUESTION, [{"text": text, "answer": None}]).traces[0]
    (equation,) = explain.trace_rows(trace, [], None)["equations"]
    assert (equation["written"], equation["linked"]) == (written, linked)
    again = signals.analyse_group(QUESTION, [{"text": f"<<{written}>>", "answer": None}]).traces[0]
    assert again.solution.equations[0].computed == trace.solution.equations[0].computed


def test_manifest_of_something_else(workplace: Path) -> None:
    write_json(Path("data/regime_w_rollouts.manifest.json"), {"params": {}})
    assert picture()["reward_params_from"] == "params.yaml"
    assert read_json(Path("data/regime_w_rollouts.manifest.json")) == {"params": {}}


def test_command_line(workplace: Path) -> None:
    """The three tools answer without torch; a wrong id is one line and exit status 1."""
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1))\nfrom stages.__main__ import main\n"
        "try: main()\nfinally: assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    repo = Path(__file__).resolve().parents[2]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, repo, *words], capture_output=True, text=True)

    assert json.loads(run("explain", "ann", "--json").stdout)["id"] == "ann"
    assert "1 of 1, 1 in all" in run("pairs", "--kind", "coherence").stdout
    assert run("suspects", "--from", "0.25").stdout.startswith("0 of 2 questions have a suspicion of 0.25 or")
    wrong = run("explain", "anne")
    assert wrong.returncode == 1 and wrong.stdout == ""
    assert wrong.stderr.startswith("error: data/regime_w_rollouts.jsonl: no question 'anne'")
    assert wrong.stderr.count("\n") == 1
