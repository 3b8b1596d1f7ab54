"""trace: from an id back to where it came from, and what it says when something on the way was changed.

The run is made by hand: real manifests around files whose contents do not matter. tests/pipeline/test_export.py
traces a real one.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from stages.core.errors import UserError
from stages.core.provenance import ALIKE, AS_RECORDED, DIFFERS, MADE_BY, UNCHECKED, UNLIKE
from stages.core.records import write_jsonl
from stages.core.stage import manifest_path, write_manifest
from stages.engine.base import request_seed
from stages.tools import trace

PAIR = "q1/0>1"
SEED = 3
QUESTION = "Ann has 3 [bags]. How many?"
ARMS = {
    "cool": {"style": "plain", "temperature": 0.5, "top_p": 1.0, "system": "Be brief."},
    "warm": {"style": "plain", "temperature": 1.0, "top_p": 0.9, "system": None},
}
# What each stage reads, and its parameters.
READS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "prepare": ([], {"seed": SEED, "data": {"source": "generated"}}),
    "base": ([], {"model": {"source": "hub", "id": "a/b", "revision": "c0ffee"}}),
    "sft": (["data/gsm8k/train.jsonl", "checkpoints/base"], {"sft": {"lora": {"r": 4}}, "seed": SEED}),
    "rollout": (
        ["data/gsm8k/train.jsonl", "checkpoints/base", "checkpoints/sft_lora"],
        {"rollout": {"per_question": 2, "arms": ARMS}, "seed": SEED},
    ),
    "coherence": (["data/rollouts.jsonl"], {"regime_w": {"weights": {"s_end": 0.5}}}),
    "preference": (["data/regime_w_rollouts.jsonl"], {"preference": {"correctness": {"per_question": 4}}}),
    "dpo": (
        ["data/coherence_preferences.jsonl", "checkpoints/base", "checkpoints/sft_lora"],
        {"dpo": {"beta": 0.1, "max_tokens": 256}, "seed": SEED},
    ),
    **{
        f"evaluate@{policy}": (
            ["data/gsm8k/platinum.jsonl", "checkpoints/base", *adapter],
            {
                "evaluate": {"samples": 2, "temperature": 0.9, "top_p": 1.0, "max_new_tokens": 64},
                "seed": SEED,
            },
        )
        for policy, adapter in (
            ("base", []),
            ("sft", ["checkpoints/sft_lora"]),
            ("dpo", ["checkpoints/dpo_coherence_lora"]),
        )
    },
}


def trajectory(pull: int, arm: str) -> dict[str, Any]:
    seed = request_seed(SEED, "rollout", "q1", str(pull))
    row = {"id": f"q1/{pull}", "arm": arm, "style": "plain", "text": f"#### {pull}", "tokens": 4 + pull}
    return {**row, "logprob": -1.5, "finish": "stop", "seed": seed}


def scored(row: dict[str, Any], correct: bool) -> dict[str, Any]:
    return {
        **row,
        "answer": row["text"][-1],
        "correct": correct,
        "s_wm": 0.25,
        "reward": 1.25 if correct else 0.5,
    }


def contents(stage: str) -> dict[str, list[dict[str, Any]] | bytes]:
    """What a stage writes: records, or bytes."""
    drawn = [trajectory(0, "cool"), trajectory(1, "warm")]
    both = [scored(drawn[0], True), scored(drawn[1], False)]
    question = {"id": "q1", "question": QUESTION, "gold": "0"}
    answer = {"completion": "#### 5", "answer": "5", "correct": True, "tokens": 4, "finish": "stop"}
    if stage.startswith("evaluate"):
        samples = [{**answer, "correct": place == 0} for place in range(2)]
        return {
            f"data/platinum_eval/{stage[9:]}.jsonl": [
                {"id": "p1", "question": "Why?", "gold": "5", **answer, "samples": samples}
            ]
        }
    splits = {"train": "q1", "valid": "v1", "platinum": "p1"}
    selection = b"step,valid_accuracy,valid_mean,score\n0,0.5,0.5,0.5\n8,0.7,0.5,0.6\n16,0.6,0.6,0.6\n"
    made: dict[str, dict[str, list[dict[str, Any]] | bytes]] = {
        "prepare": {f"data/gsm8k/{split}.jsonl": [{"id": name}] for split, name in splits.items()},
        "base": {"checkpoints/base/model.safetensors": b"base"},
        "sft": {"checkpoints/sft_lora/adapter_model.safetensors": b"sft"},
        "dpo": {
            "checkpoints/dpo_coherence_lora/adapter_model.safetensors": b"dpo",
            "metrics/curves/dpo_selection.csv": selection,
        },
        "rollout": {"data/rollouts.jsonl": [{**question, "trajectories": drawn}]},
        "coherence": {"data/regime_w_rollouts.jsonl": [{**question, "trajectories": both}]},
        "preference": {
            "data/coherence_preferences.jsonl": [
                {
                    "id": PAIR, "kind": "correctness", "question_id": "q1", "prompt": QUESTION, "margin": 0.75,
                    "chosen": "#### 0", "rejected": "#### 1", "chosen_id": "q1/0", "rejected_id": "q1/1",
                    "chosen_reward": 1.25, "rejected_reward": 0.5,
                }
            ]
        },
    }  # fmt: skip
    return made[stage]


def run_stage(stage: str) -> None:
    """Write a stage's outputs and its manifest, as `stage_run` does."""
    for name, what in contents(stage).items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(what, bytes):
            path.write_bytes(what)
        else:
            write_jsonl(path, what)
    record_stage(stage)


def record_stage(stage: str) -> None:
    reads, params = READS[stage]
    files = {name: Path(name) / "manifest.json" if Path(name).is_dir() else Path(name) for name in reads}
    inputs = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}
    others = [Path(name) for name in contents(stage) if not name.startswith(MADE_BY[stage].as_posix())]
    write_manifest({"stage": stage, "params": params, "inputs": inputs}, [MADE_BY[stage], *others])


def lock() -> None:
    """dvc.lock for what lies here; a folder's sum stands for all in it."""

    def entry(name: str) -> dict[str, str]:
        path = Path(name)
        files = [path] if path.is_file() else sorted(path.iterdir())
        return {
            "path": name,
            "md5": hashlib.md5(b"".join(map(Path.read_bytes, files))).hexdigest() + ".dir" * path.is_dir(),
        }

    stages = {}
    for stage, (reads, params) in READS.items():
        output = MADE_BY[stage]
        outs = [output.as_posix(), *([manifest_path(output).as_posix()] if output.is_file() else [])]
        code = {"path": "stages/x.py", "md5": "0"}
        stages[stage] = {
            "outs": [*map(entry, outs)],
            "deps": [*map(entry, reads), code],
            "params": {"profiles/own.yaml": params},
        }
    Path("dvc.lock").write_text(json.dumps({"schema": "2.0", "stages": stages}))  # JSON is YAML


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A whole run."""
    monkeypatch.chdir(tmp_path)
    for stage in READS:
        run_stage(stage)
    lock()
    return tmp_path


def shown(name: str, width: int = 80, **options: Any) -> str:
    stream = io.StringIO()
    trace.main(name, console=Console(file=stream, width=width, highlight=False), **options)
    assert max(map(len, stream.getvalue().splitlines())) <= width
    return stream.getvalue()


def states(picture: dict[str, Any]) -> dict[tuple[str, str], str]:
    """State by stage and path; of a path both written and read by a stage there is none."""
    links = [*picture["links"], *(link for step in picture["steps"] for link in step["links"])]
    return {(link["stage"], link["path"]): link["state"] for link in links}


def test_a_pair_back_to_its_arms_and_seeds(run: Path) -> None:
    picture = trace.trace(PAIR)
    chosen, rejected = picture["pair"]["chosen"], picture["pair"]["rejected"]
    assert (chosen["arm"], chosen["temperature"], chosen["system"]) == ("cool", 0.5, "Be brief.")
    assert (rejected["arm"], rejected["top_p"], rejected["tokens"]) == ("warm", 0.9, 5)
    assert chosen["seed"] == request_seed(SEED, "rollout", "q1", "0")
    assert (chosen["reward"], rejected["reward"], picture["pair"]["margin"]) == (1.25, 0.5, 0.75)
    assert picture["trained"]["pairs_file"] is True
    # The earlier of two equal steps.
    assert (picture["trained"]["kept_step"], picture["trained"]["last_step"]) == (8, 16)
    assert picture["drawn_by"] == {"adapter": hashlib.sha256(b"sft").hexdigest(), "state": AS_RECORDED}
    assert set(states(picture).values()) == {AS_RECORDED}
    assert not picture["broken"]
    steps = {step["stage"]: step for step in picture["steps"]}
    assert list(steps) == ["dpo", "preference", "coherence", "rollout", "sft", "base", "prepare"]
    assert {step["profile"] for step in picture["steps"]} == {"own"}
    assert steps["base"]["params"]["model"]["revision"] == "c0ffee"
    # What one stage names, another one made.
    read = {link["path"]: link["recorded"] for link in steps["dpo"]["links"] if link["role"] == "read"}
    assert read["checkpoints/sft_lora"] == steps["sft"]["identity"]
    assert read["data/coherence_preferences.jsonl"] == steps["preference"]["identity"]


@pytest.mark.parametrize("width", [80, 120])
def test_what_a_person_sees(run: Path, width: int) -> None:
    text = re.sub(r"\s+", " ", shown(PAIR, width, text=True))
    for words in (QUESTION, "correctness pair, margin 0.750", "system Be brief. –", "seed 3", "beta 0.1",
                  "The DPO adapter was trained on this pair", "step 8 of 16", "chosen #### 0 rejected #### 1",
                  "id a/b, revision c0ffee", "Every link that could be checked holds."):  # fmt: skip
        assert words in text, words
    text = re.sub(r"\s+", " ", shown("p1", width))
    assert text.count("5 ✓ 4 stop 1 of 2 right at temperature 0.9, top_p 1") == 3
    text = re.sub(r"\s+", " ", shown("q1", width))
    for words in ("0 cool 0 ✓ 4 0.25 1.25", "1 warm 1 ✗", f"It gave 1 pair: {PAIR}", "explain q1"):
        assert words in text, words


def test_an_answer_of_every_policy(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace.main("p1", as_json=True)
    picture = json.loads(capsys.readouterr().out)
    assert picture["completions"].keys() == {"base", "sft", "dpo"}
    one = picture["completions"]["dpo"]
    assert (one["greedy"]["answer"], one["greedy"]["correct"], one["greedy"]["temperature"]) == (
        "5",
        True,
        0.0,
    )
    assert [sample["seed"] for sample in one["samples"]] == [
        request_seed(SEED, "evaluate", "p1", k) for k in "01"
    ]
    assert {step["stage"] for step in picture["steps"]} == set(MADE_BY)


def change_lock(stage: str, kind: str, path: str) -> None:
    """Another sum of one path in one entry of dvc.lock."""
    lock = json.loads(Path("dvc.lock").read_text())
    (entry,) = (one for one in lock["stages"][stage][kind] if one["path"] == path)
    entry["md5"] = "0" * 32
    Path("dvc.lock").write_text(json.dumps(lock))


def other_pairs() -> None:
    Path("data/coherence_preferences.jsonl").write_text("{}")


def other_weights() -> None:
    Path("checkpoints/base/model.safetensors").write_bytes(b"bose")


def trained_again() -> None:
    Path("checkpoints/sft_lora/adapter_model.safetensors").write_bytes(b"new")
    record_stage("sft")


def absent_and_drawn_again() -> None:
    write_jsonl(Path("data/rollouts.jsonl"), [{"id": "other"}])
    record_stage("rollout")
    Path("data/rollouts.jsonl").unlink()
    Path("dvc.lock").unlink()


def lock_of_another_run() -> None:
    change_lock("rollout", "outs", "data/rollouts.manifest.json")


def absent_and_two_in_the_lock() -> None:
    change_lock("dpo", "deps", "checkpoints/sft_lora")
    for folder in ("dpo_coherence_lora", "sft_lora"):
        shutil.rmtree(Path("checkpoints") / folder)


CHANGES = [
    (other_pairs, "p1", "dpo", "data/coherence_preferences.jsonl", DIFFERS),
    (other_weights, "p1", "base", "checkpoints/base/model.safetensors", DIFFERS),
    (trained_again, "p1", "dpo", "checkpoints/sft_lora", DIFFERS),
    (lock_of_another_run, "q1", "rollout", "data/rollouts.manifest.json", DIFFERS),
    (absent_and_drawn_again, "q1", "coherence", "data/rollouts.jsonl", UNLIKE),
    (absent_and_two_in_the_lock, PAIR, "dpo", "checkpoints/sft_lora", UNLIKE),
]


@pytest.mark.parametrize(("change", "name", "stage", "path", "state"), CHANGES)
def test_a_broken_chain_is_named_and_fails(
    run: Path, change: Callable[[], None], name: str, stage: str, path: str, state: str
) -> None:
    shown(name)
    change()
    assert states(trace.trace(name))[stage, path] == state
    with pytest.raises(UserError, match=rf"{name}: the chain is broken: .*{re.escape(state)}"):
        shown(name)


def test_a_record_that_is_not_its_trajectorys(run: Path) -> None:
    """Manifests hold, and still the pair has another text, reward or seed than the files of trajectories."""

    def again(stage: str, path: str, change: Callable[[dict[str, Any]], object]) -> None:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        change(rows[0])
        write_jsonl(Path(path), rows)
        for later in list(READS)[list(READS).index(stage) :]:
            record_stage(later)
        lock()

    again("rollout", "data/rollouts.jsonl", lambda row: row["trajectories"][1].update(seed=7))
    found = trace.trace(PAIR)
    assert found["broken"] == [
        "data/rollouts.jsonl (rejected as drawn), read by pair, differs from what lies here now"
    ]
    again("coherence", "data/regime_w_rollouts.jsonl", lambda row: row["trajectories"][1].update(seed=7))
    assert [words.partition(",")[0] for words in trace.trace(PAIR)["broken"]] == ["rejected seed"]
    again("preference", "data/coherence_preferences.jsonl", lambda row: row.update(chosen_reward=9.0))
    assert len(trace.trace(PAIR)["broken"]) == 2


def test_what_is_not_here_is_said_and_compared_by_what_both_ends_recorded(run: Path) -> None:
    for name in ("base", "sft_lora", "dpo_coherence_lora"):
        shutil.rmtree(Path("checkpoints") / name)
    Path("data/rollouts.jsonl").unlink()
    found = states(trace.trace("p1"))
    assert found["evaluate@dpo", "checkpoints/dpo_coherence_lora"] == ALIKE
    assert found["dpo", "checkpoints/sft_lora"] == ALIKE  # both by dvc.lock
    assert found["dpo", "data/coherence_preferences.jsonl"] == AS_RECORDED  # by its md5
    assert found["coherence", "data/rollouts.jsonl"] == ALIKE  # its manifest is here
    assert found["base", "checkpoints/base"] == UNCHECKED
    pair = trace.trace(PAIR)
    assert pair["trained"]["pairs_file"] is True
    assert pair["trained"]["too_long"] is None
    assert states(pair)["pair", "data/rollouts.jsonl (chosen as drawn)"] == UNCHECKED
    text = " ".join(shown(PAIR).split())
    assert "(no manifest here; by dvc.lock)" in text
    assert "unless longer than dpo.max_tokens (the tokenizer is not here)" in text
    assert "could not be: their files are not here" in text
    Path("dvc.lock").unlink()
    assert [step["stage"] for step in trace.trace("q1")["steps"]] == [
        "preference",
        "coherence",
        "rollout",
        "prepare",
    ]


def test_step_zero_and_a_run_without_dpo(run: Path) -> None:
    """When no step was better than SFT, the adapter is SFT's, and no pair had an effect."""
    Path("metrics/curves/dpo_selection.csv").write_text(
        "step,valid_accuracy,valid_mean,score\n0,1,1,1\n8,0.7,0.5,0.6\n"
    )
    record_stage("dpo")
    assert "the SFT adapter itself, so no pair changed it" in " ".join(
        trace.trained_words(trace.trace(PAIR)["trained"], True)
    )
    shutil.rmtree("checkpoints/dpo_coherence_lora")
    Path("dvc.lock").unlink()
    assert "cannot be said from what is here" in " ".join(shown(PAIR).split())


def test_records_edited_by_hand(run: Path) -> None:
    """Whatever stands in them, something is shown and the chain is broken."""
    for path, change in (
        ("data/rollouts.jsonl", {"trajectories": [7, {}, {"id": "q1/0", "seed": "x", "text": 3}]}),
        (
            "data/regime_w_rollouts.jsonl",
            {"trajectories": [None, {"id": "q1/0", "s_wm": "?", "correct": "no"}]},
        ),
        ("data/platinum_eval/dpo.jsonl", {"samples": [3, {}], "answer": [1]}),
        ("data/coherence_preferences.jsonl", {"margin": "wide", "chosen_reward": None}),
    ):
        (row,) = map(json.loads, Path(path).read_text().splitlines())
        write_jsonl(Path(path), [{**row, **change}])
        for name in (PAIR, "q1", "p1"):
            with pytest.raises(UserError, match="the chain is broken"):
                shown(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("q1/0", "'q1/0' is one trajectory; trace its question (q1)"),
        ("v1", "is a validation question"),
        ("q1/0>7", "no pair 'q1/0>7'; the nearest ids are q1/0>1"),
        ("p7", "no pair or question 'p7'; the nearest ids are"),
    ],
)
def test_ids_that_nothing_has(run: Path, name: str, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        trace.main(name)


def test_missing_and_damaged_files(run: Path) -> None:
    manifest = Path("checkpoints/sft_lora/manifest.json")
    for text, words in (
        ("{", "damaged JSON"),
        ("[]", "no manifest of this pipeline"),
        ('{"stage": 1}', "stage is wrong"),
    ):
        manifest.write_text(text)
        with pytest.raises(UserError, match=words):
            trace.main("p1")
    manifest.unlink()
    Path("dvc.lock").write_text("stages: [")
    with pytest.raises(UserError, match=r"dvc\.lock: cannot be read"):
        trace.main("p1")
    write_jsonl(Path("data/gsm8k/train.jsonl"), [{"id": "q2"}])
    Path("dvc.lock").unlink()
    with pytest.raises(UserError, match="'q2' was not among the questions that the rollouts asked"):
        trace.main("q2")
    shutil.rmtree("data/platinum_eval")
    with pytest.raises(UserError, match=r"data/platinum_eval/dpo\.jsonl are not here; `dvc pull` fetches"):
        trace.main("p1")
    Path("data/coherence_preferences.jsonl").unlink()
    with pytest.raises(UserError, match="is not here; `dvc pull` fetches it"):
        trace.main(PAIR)
