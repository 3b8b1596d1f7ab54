"""Test sets beside Platinum: golds of every kind are read, what is in train is left out, a bad source is one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.run.errors import UserError
from stages.run.params import FileTest, GeneratedTest
from stages.text.rows import Row
from stages.text.testsets import files_of_tests, read_tests

REPO = Path(__file__).resolve().parents[2]
SVAMP = REPO.parent / "shared" / "data" / "svamp"
TRAIN = [
    {"id": "train-00000", "question": "Ann has 3 apples and eats one. How many are left?", "gold": "2"},
    {"id": "train-00001", "question": "A b c d e f g h i j k l m n. How many?", "gold": "2"},
]


def made(name: str, test: GeneratedTest) -> Iterator[Row]:
    """Endless rows, of which the first is in train."""
    yield {"id": f"{name}-0", "question": TRAIN[0]["question"], "gold": "2"}
    number = 0
    while True:
        number += 1
        yield {"id": f"{name}-{number}", "question": f"What is {number} + {test.start[0]}?", "gold": "9"}


def written(path: Path, rows: list[dict[str, Any]], **columns: Any) -> FileTest:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FileTest(source="file", file=path.name, path=str(path), **columns)


def read(**tests: Any) -> tuple[list[Row], dict[str, dict[str, int]]]:
    return read_tests(tests, TRAIN, [], made)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("145.0", "145"),
        (145.0, "145"),
        (7, "7"),
        ("$1,200", "1200"),
        ("7-6=1\n#### 1", "1"),
        ("The answer is 5.", "5"),
    ],
)
def test_a_gold_may_be_bare(tmp_path: Path, answer: object, gold: str) -> None:
    rows, _ = read(mine=written(tmp_path / "q.jsonl", [{"question": "Why?", "answer": answer}]))
    assert rows == [{"id": "mine-00000", "test": "mine", "question": "Why?", "gold": gold}]


def test_columns_are_named_and_questions_joined(tmp_path: Path) -> None:
    """As in SVAMP's own file; what is no question with a number is left out, counted, and keeps its place."""
    rows = [
        {"Body": "Ben has 3.", "Question": "How many?", "Answer": "None"},
        {"Body": "Ben has 4.", "Question": "How many?", "Answer": 4.0},
        {"Body": "Ben has 4.", "Question": "How many?", "Answer": 5},
    ]
    test = written(tmp_path / "q.jsonl", rows, question=["Body", "Question"], answer="Answer", skip="None")
    found, counts = read(mine=test)
    assert found == [{"id": "mine-00001", "test": "mine", "question": "Ben has 4. How many?", "gold": "4"}]
    assert counts["mine"] == {
        "questions": 1, "read": 3, "skipped": 1, "duplicates": 1, "conflicting_golds": 1, "overlap_exact": 0,
        "overlap_13gram": 0,
    }  # fmt: skip


def test_what_is_in_train_is_left_out(tmp_path: Path) -> None:
    """All of it, or 13 words in a row; each set by itself, in the order of the profile."""
    rows = [
        {"question": TRAIN[0]["question"], "answer": "2"},
        {"question": "Say: a b c d e f g h i j k l m?", "answer": "2"},
        {"question": "And now?", "answer": "3"},
    ]
    generated = GeneratedTest(source="generated", start=[31, 60], questions=2)
    found, counts = read(mine=written(tmp_path / "q.jsonl", rows), larger=generated)
    assert [row["id"] for row in found] == ["mine-00002", "larger-1", "larger-2"]
    assert (counts["mine"]["overlap_exact"], counts["mine"]["overlap_13gram"]) == (1, 1)
    assert (counts["larger"]["read"], counts["larger"]["questions"]) == (3, 2)


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([{"question": "Why?", "Answer": 3}], {}, "q.jsonl:1: field 'answer' is missing; fields found: 'question',"),
        (
            [{"question": "Why?", "answer": "3 or 4"}],
            {},
            "q.jsonl:1: field 'answer' must be a number with at most a unit, or end in '#### ' and one, found '3",
        ),
        ([{"question": "Why?", "a": "None"}], {"answer": "a"}, "q.jsonl:1: field 'a' must be a number with "),
        ([{"question": "Why?", "answer": True}], {}, "q.jsonl:1: field 'answer' must be str or int or float"),
        ([{"A": "Why?", "B": " ", "answer": 3}], {"question": ["B"]}, "q.jsonl:1: field 'B' is empty or not text"),
        ([], {}, "data.tests.mine: no question is left of 0 "),
        ([{"question": TRAIN[0]["question"], "answer": 3}], {}, "data.tests.mine: no question is left of 1 "),
    ],
)  # fmt: skip
def test_a_bad_source_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], columns: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    test = written(Path("q.jsonl"), rows, **columns)
    with pytest.raises(UserError) as caught:
        read(mine=test)
    assert str(caught.value).startswith(message)


def test_a_number_in_parquet_or_an_array_is_no_truth_value(tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    path.write_text('[{"question": "Why?", "answer": true}]')
    with pytest.raises(UserError, match="field 'answer' is empty or not text"):
        read(mine=FileTest(source="file", file="q.json", path=str(path)))


def test_a_file_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    here = written(tmp_path / "a.jsonl", [])
    gone = FileTest(source="file", file="b.jsonl", path=str(tmp_path / "b.jsonl"))
    assert files_of_tests({"here": here}) == [tmp_path / "a.jsonl"]
    with pytest.raises(
        UserError, match=r"b\.jsonl: there is no such file, so data\.tests\.gone .*there is: a\.jsonl"
    ):
        files_of_tests({"here": here, "gone": gone})


def test_the_shipped_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file in examples/tests is read as docs/evaluation.md says."""
    test = FileTest(
        source="file", file="daily.csv", path=str(REPO / "examples/tests/daily.csv"),
        question=["Body", "Question"], answer="Answer",
    )  # fmt: skip
    rows, _ = read(daily=test)
    assert [row["gold"] for row in rows] == ["85", "5", "68"]


@pytest.mark.skipif(not SVAMP.is_dir(), reason="real SVAMP is not beside this repository (../shared/data)")
def test_real_svamp() -> None:
    rows, counts = read(svamp=FileTest(source="file", file="test.jsonl", path=str(SVAMP / "test.jsonl")))
    assert counts["svamp"]["read"] == counts["svamp"]["questions"] == len(rows) == 998
