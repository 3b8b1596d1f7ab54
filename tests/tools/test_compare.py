"""compare: two graded logs are paired by id, whatever their order, and get the pipeline's own statistics."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from stages.run.errors import UserError
from stages.stats import one, paired
from stages.tools import compare
from tests.stats.rows import policies, row
from tests.tools.screen import printed


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def logs(tmp_path: Path, a: list[dict[str, Any]], b: list[dict[str, Any]]) -> tuple[Path, Path]:
    return write(tmp_path / "sft.jsonl", a), write(tmp_path / "dpo.jsonl", b)


def shown(a: Path, b: Path, **options: Any) -> str:
    return printed(compare.main, a, b, **options)


def facts(capsys: pytest.CaptureFixture[str], a: Path, b: Path, **options: Any) -> dict[str, Any]:
    compare.main(a, b, as_json=True, **options)
    return json.loads(capsys.readouterr().out)


def test_statistics_are_those_of_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every number of the report's comparison, however the second log is ordered."""
    a, b = policies(gained=7, lost=9, both=80, neither=34)
    rng = random.Random(1)
    for record in (*a, *b):
        record["samples"] = [{"correct": rng.random() < 0.5} for _ in range(4)]
    want = paired.compare(a, b, "sft", "dpo", seed=0)
    assert "mean_p" in want
    random.Random(3).shuffle(b)
    files = logs(tmp_path, a, b)
    made = facts(capsys, *files)
    assert {name: made[name] for name in want} == want
    assert (made["accuracy_a_low"], made["accuracy_a_high"]) == one.wilson(89, 130)
    assert (made["accuracy_b_low"], made["accuracy_b_high"]) == one.wilson(87, 130)


def test_what_is_printed(tmp_path: Path) -> None:
    """The result that was once reported as one, in 80 columns and in words."""
    text = shown(*logs(tmp_path, *policies(gained=7, lost=9, both=854, neither=339)))
    for words in (
        "sft → dpo, 1,209 questions in both", "71.4 %", "71.2 %", "-0.2", "0.80", "68.8–73.9",
        "gained 7 (only dpo right), lost 9 (only sft right)", "identical completions: 1,193 of 1,209",
        "greedy: no difference can be seen; one of at least 1.0 points would have been",
    ):  # fmt: skip
        assert words in text
    assert "mean@" not in text


def test_samples_have_a_test_of_their_own(tmp_path: Path) -> None:
    a = [row(i, True, [True, False, False, False]) for i in range(60)]
    text = shown(*logs(tmp_path, a, [row(i, True, [True, True]) for i in range(60)]))
    assert "mean@2/4" in text and "+75.0" in text and "<0.0001" in text
    assert "mean@2: dpo is better (p < 0.0001)" in text


def test_questions_on_one_side_only_are_counted_and_named(tmp_path: Path) -> None:
    a, b = [row(i, True) for i in range(10)], [row(i, i > 4) for i in (3, 4, 5, 77)]
    text = shown(*logs(tmp_path, a, b))
    assert "sft → dpo, 3 questions in both" in text and "gained 0 (only dpo right), lost 2" in text
    assert "only in sft, left out: 7 (q0, q1, q2, q6, q7, and 2 more)" in text
    assert "only in dpo, left out: 1 (q77)" in text


@pytest.mark.parametrize(("kind", "number"), [("gained", "q0"), ("lost", "q1")])
def test_changed_questions_are_shown(kind: str, number: str, tmp_path: Path) -> None:
    """The question, the gold, and how both completions ended."""
    a, b = [row(0, False), row(1, True), row(2, True)], [row(2, True), row(1, False), row(0, True)]
    for record in (*a, *b):
        record["completion"] = f"long story. {'word ' * 300}#### {int(record['correct'])}"
    files = logs(tmp_path, a, b)
    text = shown(*files, show=(kind, 5))
    assert f"{kind}: {number} ─" in text and text.count(f"{kind}: ") == 1
    assert f"How many are {number[1]}?" in text
    assert "... " in text and "#### 0" in text and "#### 1" in text and "long story" not in text
    same = shown(files[0], files[0], show=(kind, 5))
    assert f"no question was {kind}" in same


def test_fields_by_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """lm-evaluation-harness's own verdicts, without texts: what cannot be known is not said to be 0."""
    a = [{"doc": {"id": i}, "exact_match": float(i > 2)} for i in range(9)]
    b = [{"doc": {"id": i}, "exact_match": 1.0} for i in range(9)]
    files = logs(tmp_path, a, b)
    made = facts(capsys, *files, id_field="doc.id", correct_field="exact_match")
    assert (made["gained"], made["lost"], made["identical_completions"]) == (3, 0, None)
    assert "identical completions: unknown" in shown(*files, id_field="doc.id", correct_field="exact_match")


def test_logs_that_cannot_be_paired(tmp_path: Path) -> None:
    """Each mistake is one line that says where and what to do."""
    good = write(tmp_path / "good.jsonl", [row(0, True), row(1, True)])
    for name, records, words in (
        ("twice", [row(5, True), row(6, True), row(5, False)], "lines 1 and 3 have the same id 'q5'"),
        ("alike", [{"id": 5, "correct": 1}, {"id": "5", "correct": 0}], "lines 1 and 2 have the same id '5'; each may"),
        ("raw", [{"id": "q0", "completion": "#### 1"}], r"jsonl:1: not graded \(no field 'correct'\); run `python"),
        ("other", [{"id": 0, "correct": True}], r"share no question id \(good has 'q0' and other has '0'\)"),
        ("nameless", [{"correct": True}], "jsonl:1: field 'id' is missing; fields found: 'correct'; name it with --id"),
        ("odd", [{"id": 1.5, "correct": True}], "odd.jsonl:1: field 'id' must be text or a whole number, found 1.5"),
        ("words", [{"id": "q0", "correct": "yes"}], "words.jsonl:1: field 'correct' must be true or false"),
        ("empty", [], "empty.jsonl: holds no records"),
        ("uneven", [row(0, True, [True]), row(1, True, [True, False])], "1 samples at line 1, 2 at line 2"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words) as error:
            compare.main(good, write(tmp_path / f"{name}.jsonl", records))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        compare.main(good, tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="say gained or lost, and how many"):
        compare.main(good, good, show=("changed", 3))


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    paths = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        paths.append(write(tmp_path / name / "log.jsonl", [row(0, name == "two")]))
    text = shown(*paths).replace("\n", "")
    assert f"(only {paths[1]} right)".replace(" ", "") in text.replace(" ", "")
