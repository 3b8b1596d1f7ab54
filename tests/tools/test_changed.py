"""changed: twins of a file from elsewhere, the counts, and one clear line for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.run.errors import UserError
from stages.run.files import read_jsonl, write_jsonl
from stages.tools import changed
from tests.tools.screen import printed, words

QUESTION = "Ann has 13 bags of 4 apples and eats 2. How many apples are left?"
SOLUTION = "She has <<13*4=52>>52.\nSo <<52-2=50>>50 are left.\n#### 50"
ROWS: list[dict[str, Any]] = [
    {"question": QUESTION, "answer": SOLUTION},
    {
        "question": QUESTION.replace("Ann", "Ben"),
        "answer": SOLUTION.replace("52-2=50", "52-2=51").replace("50", "51"),
    },
    {"question": "How many are two and two?", "answer": "<<2+2=4>>4\n#### 4"},
]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("questions.jsonl"), ROWS)
    return Path("questions.jsonl")


def run(file: Path, change: changed.Change = "one", seed: int = 0) -> tuple[list[dict[str, Any]], str]:
    screen = printed(changed.main, file, Path("twins.jsonl"), change, seed)
    return list(read_jsonl(Path("twins.jsonl"))), words(screen)


def test_twins_and_counts(file: Path) -> None:
    twins, screen = run(file)
    assert [twin["of"] for twin in twins] == ["questions-00000"]
    assert "3 questions, 1 with a twin, 1 twins" in screen and "twins: twins.jsonl" in screen
    assert "1 a needed equation does not hold" in screen and "1 the answer needs no digit number" in screen
    assert "twice" not in screen
    every, screen = run(file, "all")
    assert {"questions-00000~1", "questions-00000~2"} <= {twin["id"] for twin in every}
    assert run(file, seed=1)[0] != run(file, seed=2)[0] or run(file, seed=1)[0] != run(file, seed=3)[0]


def test_the_pipelines_own_rows_and_their_ids(file: Path) -> None:
    write_jsonl(file, [{"id": "train-00007", "question": QUESTION, "solution": SOLUTION, "gold": "50"}])
    twins, _ = run(file)
    assert twins[0]["of"] == "train-00007" and twins[0]["id"].startswith("train-00007~")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda: [*ROWS, {"answer": "#### 1"}], "questions.jsonl:4: field 'question' is missing; fields"),
        (lambda: [{"question": "How many?"}], "questions.jsonl:1: field 'answer' is empty or not text (None)"),
        (lambda: [{"question": "How many?", "answer": "12"}], "questions.jsonl:1: field 'answer' must end in '#### '"),
        (lambda: [{"id": "a", **ROWS[0]}, {"id": "a", **ROWS[2]}], "questions.jsonl:2: the id 'a' is there twice"),
        (lambda: [], "questions.jsonl: no records in it"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(file: Path, rows: Callable[[], list[dict[str, Any]]], message: str) -> None:
    write_jsonl(file, rows())
    with pytest.raises(UserError) as raised:
        run(file)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_the_file_of_questions_is_not_overwritten(file: Path) -> None:
    with pytest.raises(UserError, match="is the file of questions itself"):
        changed.main(file, file, "one", 0)
    assert len(list(read_jsonl(file))) == 3
    with pytest.raises(UserError, match="cannot be read"):
        changed.main(Path("none.jsonl"), Path("twins.jsonl"), "one", 0)


def test_the_command(file: Path) -> None:
    command = [sys.executable, "-m", "stages", "changed", str(file.resolve()), "--out", "new.jsonl", "--all"]
    repository = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [*command[:-2], str(file.resolve().parent / "new.jsonl"), "--all"],
        cwd=repository,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["of"] for line in Path("new.jsonl").read_text().splitlines()]
