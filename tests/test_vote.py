"""vote: from a policy's samples to metrics/vote and metrics/vote_details, without a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from stages import vote
from stages.run.errors import UserError
from stages.run.files import read_json, read_jsonl, write_jsonl
from tests.regime_w.worked_example import QUESTION, TEXTS

REPO = Path(__file__).resolve().parents[1]
SLIP = "<<3*4=12>>12 <<12-2=11>>11\n#### 11"  # its last sum does not hold


def row(name: str, texts: list[str], **more: Any) -> dict[str, Any]:
    samples = [
        {"completion": text, "answer": text.rsplit(" ", 1)[1], "correct": text.endswith(" 10"), **more}
        for text in texts
    ]
    return {"id": name, "question": QUESTION, "gold": "10", "samples": samples}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(REPO / "tests" / "small", tmp_path, dirs_exist_ok=True)
    (tmp_path / "scorer.py").symlink_to(REPO / "stages" / "regime_w" / "signals.py")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(rows: list[dict[str, Any]]) -> None:
    write_jsonl(Path("data/platinum_eval/sft.jsonl"), rows)


def run() -> tuple[dict[str, Any], dict[str, Any]]:
    vote.main("sft")
    return read_json(Path("metrics/vote/sft.json")), read_json(Path("metrics/vote_details/sft.json"))


def test_slips_lose_to_a_coherent_minority(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three samples slip alike, two are right and agree in why: the majority is wrong, coherence is not."""
    put([row(f"q{i}", [SLIP] * 3 + TEXTS[:2]) for i in range(12)])
    few, details = run()
    assert (few["maj_at_5"], few["coherent_at_5"], few["pass_at_5"]) == (0.0, 1.0, 1.0)
    assert few.pop("vote_p") == details["p"] == pytest.approx(2 / 2**12)
    assert {name: details[name] for name in few} == few
    votes = list(read_jsonl(Path("data/votes/sft.jsonl")))
    assert votes == [{"id": f"q{i}", "majority": 0.0, "coherent": 1.0} for i in range(12)]
    assert list(details["by"]) == ["s_end", "s_path", "s_cf", "s_wm", "reach"]
    said = capsys.readouterr().err
    assert "12 questions of 5 samples: majority 0.0%, by s_cf 100.0%; coherence is better" in said


def test_the_signal_is_the_one_of_the_parameters(workplace: Path) -> None:
    put([row("q1", [SLIP] * 3 + TEXTS[:2], logprob=-3.0, tokens=9)])
    params = Path("params.yaml")
    for rule, elected in (("s_end", 0.0), ("s_cf", 1.0), ("both", 1.0), ("logprob", 0.0)):
        params.write_text(params.read_text().replace("vote: s_cf", f"vote: {rule}"))
        few, details = run()
        assert (details["vote"], few["coherent_at_5"]) == (rule, elected)
        params.write_text(params.read_text().replace(f"vote: {rule}", "vote: s_cf"))


def test_without_samples_there_is_nothing_to_vote_on(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put([{"id": "q1", "question": QUESTION, "gold": "10"}])
    assert run() == ({}, {"questions": 0})
    assert "no samples were drawn (evaluate.samples is 0)" in capsys.readouterr().err


def test_same_bytes_twice_and_a_manifest_of_what_was_read(workplace: Path) -> None:
    put([row(f"q{i}", [SLIP] * 2 + TEXTS) for i in range(5)])
    outputs = [
        Path("metrics/vote/sft.json"),
        Path("metrics/vote_details/sft.json"),
        Path("metrics/vote/sft.manifest.json"),
        Path("data/votes/sft.jsonl"),
    ]
    run()
    first = [path.read_bytes() for path in outputs]
    run()
    assert [path.read_bytes() for path in outputs] == first
    manifest = json.loads(first[2])
    assert manifest["stage"] == "vote@sft"
    assert set(manifest["params"]["regime_w"]) == {"scorer", "vote", "weights"}
    assert set(manifest["inputs"]) == {"data/platinum_eval/sft.jsonl", "scorer.py"}


def test_mistakes(workplace: Path) -> None:
    """One line that says what is wrong; the old metrics stay."""
    put([row("q1", TEXTS)])
    run()
    old = Path("metrics/vote/sft.json").read_bytes()
    params = Path("params.yaml")
    params.write_text(params.read_text().replace("vote: s_cf", "vote: both"))
    with pytest.raises(UserError, match=r"question 'q1': a sample has no 'logprob' or no 'tokens'"):
        vote.main("sft")
    params.write_text(params.read_text().replace("vote: both", "vote: coherence"))
    with pytest.raises(UserError, match=r"params\.yaml:\d+: regime_w\.vote: input should be 's_end', "):
        vote.main("sft")
    assert Path("metrics/vote/sft.json").read_bytes() == old
    params.write_text(params.read_text().replace("vote: coherence", "vote: s_cf"))
    with pytest.raises(UserError, match=r"data/platinum_eval/dpo\.jsonl: is missing; run `dvc repro`"):
        vote.main("dpo")
