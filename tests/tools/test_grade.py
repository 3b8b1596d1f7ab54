"""grade: logs of any shape get the pipeline's own verdicts, and a bad line is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stages.run.errors import UserError
from stages.stats.one import summarise
from stages.tools import grade
from stages.tools.grade import FieldNames
from tests.tools.screen import printed, words

REPO = Path(__file__).resolve().parents[2]


def write(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def metrics_of(capsys: pytest.CaptureFixture[str], *files: str, **options: Any) -> dict[str, Any]:
    grade.main(files, options.pop("fields", FieldNames()), as_json=True, **options)
    return json.loads(capsys.readouterr().out)


def shown(*files: str, **options: Any) -> str:
    return printed(grade.main, files, options.pop("fields", FieldNames()), **options)


# --- verdicts


LM_EVAL = {
    "doc_id": 7,
    "doc": {"question": "How many eggs?", "answer": "16 - 3 = 13\n#### 13"},
    "target": "13",
    "arguments": {"gen_args_0": {"arg_0": "Question: How many eggs?\nAnswer:"}},
    "resps": [["There are 13.\nThe answer is 13."]],
    "filtered_resps": ["13"],
    "filter": "strict-match",
    "exact_match": 1.0,
}


@pytest.mark.parametrize(
    ("record", "fields"),
    [
        (LM_EVAL, FieldNames("resps", "target", "doc.question", "doc_id")),
        (LM_EVAL, FieldNames("resps.0.0", "doc.answer", "doc.question", "doc_id")),
        ({"q": "How many eggs?", "text": "#### 13", "n": 13, "k": 7}, FieldNames("text", "n", "q", "k")),
        ({"q": "How many eggs?", "text": ["A: 13"], "n": 13.0, "k": 7}, FieldNames("text", "n", "q", "k")),
        (
            {"in": {"q": "How many eggs?", "k": 7}, "choices": [{"message": {"content": "#### 13"}}], "n": ["A: 13"]},
            FieldNames("choices.0.message.content", "n", "in.q", "in.k"),
        ),
        ({"a.b": "#### 13", "gold": "$13 dollars.", "id": 7, "question": "How many eggs?"}, FieldNames("a.b")),
    ],
)  # fmt: skip
def test_shapes_of_logs(record: dict[str, Any], fields: FieldNames) -> None:
    """lm-evaluation-harness, chat completions, lists of one text; golds as numbers, texts, plain answers."""
    row = grade.grade(record, fields)
    assert (row["id"], row["question"], row["gold"], row["answer"]) == (7, "How many eggs?", "13", "13")
    assert row["correct"] is True


def test_the_question_tells_a_repeated_prompt_from_the_answer() -> None:
    """Without the question, the `#### 42` of the prompt that comes again would be the answer."""
    question = "Say it as #### 42. How many eggs?"
    record = {"completion": f"She has 13.\n#### 13\n{question}", "gold": 13}
    assert grade.grade(record, FieldNames())["answer"] == "42"
    row = grade.grade({**record, "question": question}, FieldNames())
    assert (row["answer"], row["leak"]) == ("13", True)


# --- the graded log


def test_what_a_verdict_replaces_is_kept(tmp_path: Path) -> None:
    """`answer` is the gold's text in many files; grading twice changes nothing."""
    record = {"question": "?", "answer": "2+2\n#### 4", "correct": "yes", "completion": ["#### 5"], "x": 1}
    log, once, twice = (tmp_path / name for name in ("log.jsonl", "once.jsonl", "twice.jsonl"))
    write(log, [record])
    shown(str(log), fields=FieldNames(gold="answer"), out=once)
    [row] = rows_of(once)
    assert [row[name] for name in ("gold", "answer", "correct", "completion", "x")] == [
        "4",
        "5",
        False,
        "#### 5",
        1,
    ]
    assert row["original"] == {name: record[name] for name in ("answer", "correct", "completion")}
    shown(str(once), out=twice)
    assert twice.read_bytes() == once.read_bytes()


def test_odd_values_survive(tmp_path: Path) -> None:
    """NaN, which is no JSON, becomes null; half a surrogate pair stays what it was."""
    log, out = tmp_path / "log.jsonl", tmp_path / "out.jsonl"
    log.write_text('{"gold": 1, "completion": "\\ud800 #### 1", "loss": NaN}\n\n', encoding="utf-8-sig")
    shown(str(log), out=out)
    [row] = rows_of(out)
    assert (row["completion"], row["loss"], row["correct"]) == ("\ud800 #### 1", None, True)


@pytest.mark.parametrize(
    ("tokens", "seen"),
    [(30, 30), ("30", 30), ([5, 6, 7], 3), (True, None), ({"prompt": 9}, None), (None, None)],
)
def test_tokens_are_read_as_in_rollouts(tokens: object, seen: int | None) -> None:
    """What is no number of tokens is left as it is: the field may be about something else."""
    row = grade.grade({"completion": "#### 1", "gold": 1, "tokens": tokens}, FieldNames())
    assert row.get("tokens") == seen


# --- metrics


def made_log(count: int) -> list[dict[str, Any]]:
    return [
        {"id": i, "gold": i, "completion": f"{'word ' * (i % 40)}#### {i + (i % 3 == 0)}", "tokens": i % 50,
         "finish": "length" if i % 10 == 0 else "stop"}
        for i in range(count)
    ]  # fmt: skip


def test_metrics_are_those_of_an_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To the last bit."""
    log, out = write(tmp_path / "log.jsonl", made_log(1000)), tmp_path / "out.jsonl"
    metrics = metrics_of(capsys, log, out=out)
    wanted = summarise(rows_of(out), 0)
    assert {name: metrics[name] for name in wanted} == wanted


def test_several_files_are_the_parts_of_one_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = made_log(20)
    parts = [write(tmp_path / f"{i}.jsonl", records[10 * i : 10 * i + 10]) for i in range(2)]
    whole, in_parts = metrics_of(capsys, write(tmp_path / "all.jsonl", records)), metrics_of(capsys, *parts)
    assert all(in_parts[name] == whole[name] for name in whole if name not in ("files", "warnings"))
    assert in_parts["warnings"] == [text.replace("all.jsonl", "2 files") for text in whole["warnings"]]


def test_table_and_loud_warnings(tmp_path: Path) -> None:
    text = shown(write(tmp_path / "log.jsonl", made_log(20)))
    assert "20 completions graded" in text and "accuracy" in text and "65.0 %" in text
    assert "WARNING log.jsonl: 10.0% of the completions were cut" in words(text)
    bare = shown(write(tmp_path / "bare.jsonl", [{"gold": 1, "completion": "#### 1"}]))
    assert not {"tokens_mean", "truncated", "end_token"} & set(bare.split())


def test_standard_input() -> None:
    """Through the command, with a pipe: the table on stdout, nothing on stderr."""
    text = '{"response": "#### 2", "gold": 2}\n{"response": "#### 3", "gold": 2}\n'
    command = [sys.executable, "-m", "stages", "grade", "-", "--completion", "response", "--json"]
    done = subprocess.run(command, cwd=REPO, input=text, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["accuracy"] == 0.5
    assert done.stderr == ""


# --- mistakes


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not a JSON object in UTF-8"),
        ('"text"', "a JSON object is wanted, found str"),
        ('{"gold": 1}', "field 'completion' is missing; fields found: 'gold'; name it with --completion"),
        ('{"completion": null, "gold": 1}', "field 'completion' must be text, found None"),
        ('{"completion": ["a", "b"], "gold": 1}', "holds 2 values; name one of them, as completion.0"),
        ('{"completion": {"text": "a"}, "gold": 1}', "name one of its fields, as completion.text"),
        ('{"completion": "a"}', "field 'gold' is missing"),
        ('{"completion": "a", "gold": true}', "field 'gold' must be text or a number, found True"),
        ('{"completion": "a", "gold": "none"}', "field 'gold' holds no number that could be the answer: 'none'"),
        ('{"completion": "a", "gold": NaN}', "field 'gold' must be text or a number"),
        ("[" * 100_000, "not a JSON object"),
        ('{"completion": "a", "gold": 1, "x": 1e999}', "JSON compliant"),
    ],
)  # fmt: skip
def test_bad_lines_are_named_or_counted(
    line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One clear line; the old output stays. With --skip-bad they are counted and the rest is graded."""
    log, out = tmp_path / "log.jsonl", tmp_path / "out.jsonl"
    good = '{"completion": "#### 1", "gold": 1}'
    log.write_text(f"{good}\n\n{line}\n{good}\n", encoding="utf-8")
    out.write_text("old")
    with pytest.raises(UserError) as error:
        grade.main([str(log)], FieldNames(), out)
    assert str(error.value).startswith(f"{log}:3: ") and message in str(error.value)
    assert "\n" not in str(error.value)
    assert out.read_text() == "old"
    metrics = metrics_of(capsys, str(log), skip_bad=True, out=out)
    assert (metrics["questions"], metrics["bad_lines"], metrics["accuracy"]) == (2, 1, 1)
    assert "bad lines left out: 1, the first: " in words(shown(str(log), skip_bad=True, out=out))


def test_named_fields_must_be_there(tmp_path: Path) -> None:
    """A question or an id that was asked for is not silently left out."""
    log = write(tmp_path / "log.jsonl", [{"completion": "#### 1", "gold": 1, "n": 1.5}])
    for fields, message in (
        (FieldNames(question="prompt"), "field 'prompt' is missing; .*--question"),
        (FieldNames(id="doc_id"), "field 'doc_id' is missing; .*--id"),
        (FieldNames(id="n"), "field 'n' must be text or a whole number, found 1.5"),
    ):
        with pytest.raises(UserError, match=message):
            grade.main([log], fields)


def test_files_that_cannot_be_graded(tmp_path: Path) -> None:
    log = write(tmp_path / "log.jsonl", [{"completion": "#### 1", "gold": 1}])
    for name, text in (("empty", "\n"), ("bad", "{\n")):
        (tmp_path / f"{name}.jsonl").write_text(text)
    out = tmp_path / "out.jsonl"
    for files, target, message in (
        ([str(tmp_path / "none.jsonl")], out, r"none\.jsonl: cannot be read \(No such file"),
        ([log], Path(log), "is the log itself; name another file"),
        ([str(tmp_path / "empty.jsonl")], out, "nothing to grade, no records in it"),
        ([str(tmp_path / "bad.jsonl")], out, r"all 1 lines are bad: .*bad\.jsonl:1: not a JSON object"),
    ):
        with pytest.raises(UserError, match=message):
            grade.main(files, FieldNames(), target, skip_bad=True)
    assert not out.exists()


def test_memory_does_not_grow_with_the_log(tmp_path: Path) -> None:
    """64 MB more of log; the peak of the process stays within 24 MB."""
    code = (
        "import resource, sys; from pathlib import Path; from stages.tools import grade\n"
        "grade.main([sys.argv[1]], grade.FieldNames(), Path(sys.argv[2]), as_json=True)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )

    def peak(megabytes: int) -> int:
        log = tmp_path / f"{megabytes}.jsonl"
        line = json.dumps({"gold": 1, "completion": "She has one egg. #### 1", "more": "x" * 16_000}) + "\n"
        with log.open("w") as file:
            file.writelines(line for _ in range(megabytes * 1_000_000 // len(line)))
        command = [sys.executable, "-c", code, str(log), str(tmp_path / "out.jsonl")]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
        return int(done.stdout.split()[-1])

    assert peak(80) < peak(16) + 24
