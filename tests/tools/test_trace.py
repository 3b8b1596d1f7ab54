"""trace: from an id back to where it came from, and what it says when something on the way was changed.

The run is made by hand: real manifests around files whose contents do not matter. tests/pipeline/test_export.py
traces a real one.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.policy.request import request_seed
from stages.run.errors import UserError
from stages.run.files import jsonl_line, write_jsonl
from stages.run.history import ALIKE, AS_RECORDED, DIFFERS, UNCHECKED, UNLIKE, made_by
from stages.run.paths import LAST
from stages.run.stage import manifest_path, write_manifest
from stages.tools import trace
from tests.policy import SMALL
from tests.tools.screen import printed, words

PAIR = "q1/0>1"
SEED = 3
QUESTION = "Ann has 3 [bags]. How many?"
ARMS = {
    "cool": {"style": "plain", "temperature": 0.5, "top_p": 1.0, "system": "Be brief."},
    "warm": {"style": "plain", "temperature": 1.0, "top_p": 0.9, "system": None},
}
TRAIN, BASE, SFT = "data/gsm8k/train.jsonl", "checkpoints/base", "checkpoints/sft_lora"
EVALUATE = {"evaluate": {"samples": 2, "temperature": 0.9, "top_p": 1.0}, "seed": SEED}
# What each stage reads, and its parameters.
READS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "prepare": ([], {"seed": SEED, "data": {"source": "generated"}}),
    "base": ([], {"model": {"source": "hub", "id": "a/b", "revision": "c0ffee"}}),
    "sft": ([TRAIN, BASE], {"sft": {"lora": {"r": 4}}, "seed": SEED}),
    "rollout@dpo": ([TRAIN, BASE, SFT], {"rollout": {"per_question": 2, "arms": ARMS}, "seed": SEED}),
    "coherence@dpo": ([LAST.rollouts.as_posix()], {"regime_w": {"weights": {"s_end": 0.5}}}),
    "preference@dpo": ([LAST.scored.as_posix()], {"preference": {"correctness": {"per_question": 4}}}),
    "dpo@dpo": ([LAST.pairs.as_posix(), BASE, SFT], {"dpo": {"beta": 0.1, "max_tokens": 256}, "seed": SEED}),
    "evaluate@base": (["data/gsm8k/platinum.jsonl", BASE], EVALUATE),
    "evaluate@sft": (["data/gsm8k/platinum.jsonl", BASE, SFT], EVALUATE),
    "evaluate@dpo": (["data/gsm8k/platinum.jsonl", BASE, "checkpoints/dpo_coherence_lora/dpo"], EVALUATE),
}
DRAWN = [
    {"id": f"q1/{pull}", "arm": arm, "style": "plain", "text": f"#### {pull}", "tokens": 4 + pull,
     "logprob": -1.5, "finish": "stop", "seed": request_seed(SEED, "rollout", "q1", str(pull))}
    for pull, arm in enumerate(ARMS)
]  # fmt: skip
VERDICTS = (
    {"answer": "0", "correct": True, "s_wm": 0.25, "reward": 1.25},
    {"answer": "1", "correct": False, "s_wm": 0.25, "reward": 0.5},
)
ANSWER = {"completion": "#### 5", "answer": "5", "correct": True, "tokens": 4, "finish": "stop"}
ASKED = {
    "id": "p1",
    "question": "Why?",
    "gold": "5",
    **ANSWER,
    "samples": [ANSWER, {**ANSWER, "correct": False}],
}
TRAINED_ON = {
    "id": PAIR, "kind": "correctness", "question_id": "q1", "prompt": QUESTION, "margin": 0.75,
    "chosen": "#### 0", "rejected": "#### 1", "chosen_id": "q1/0", "rejected_id": "q1/1",
    "chosen_reward": 1.25, "rejected_reward": 0.5,
}  # fmt: skip


def contents(stage: str) -> dict[str, Any]:
    """What a stage writes: a record, or bytes."""
    question = {"id": "q1", "question": QUESTION, "gold": "0"}
    scored = [row | verdict for row, verdict in zip(DRAWN, VERDICTS, strict=True)]
    made: dict[str, dict[str, Any]] = {
        "prepare": {TRAIN: {"id": "q1"}, "data/gsm8k/platinum.jsonl": {"id": "p1"}},
        "base": {f"{BASE}/model.safetensors": b"base"},
        "sft": {f"{SFT}/adapter_model.safetensors": b"sft"},
        "dpo@dpo": {
            "checkpoints/dpo_coherence_lora/dpo/adapter_model.safetensors": b"dpo",
            "metrics/kept/dpo.json": b'{"kept": 8, "last": 16}',
        },
        "rollout@dpo": {LAST.rollouts.as_posix(): {**question, "trajectories": DRAWN}},
        "coherence@dpo": {LAST.scored.as_posix(): {**question, "trajectories": scored}},
        "preference@dpo": {LAST.pairs.as_posix(): TRAINED_ON},
    }
    return made.get(stage) or {f"data/platinum_eval/{stage.partition('@')[2]}.jsonl": ASKED}


def record_stage(stage: str) -> None:
    """Write a stage's manifest, as `stage_run` does."""
    reads, params = READS[stage]
    files = {name: Path(name) / "manifest.json" if Path(name).is_dir() else Path(name) for name in reads}
    inputs = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}
    others = [Path(name) for name in contents(stage) if not name.startswith(made_by()[stage].as_posix())]
    write_manifest({"stage": stage, "params": params, "inputs": inputs}, [made_by()[stage], *others])


def lock() -> None:
    """dvc.lock for what lies here; a folder's sum stands for all in it."""

    def entry(name: str) -> dict[str, str]:
        path = Path(name)
        files = [path] if path.is_file() else sorted(path.iterdir())
        md5 = hashlib.md5(b"".join(map(Path.read_bytes, files))).hexdigest() + ".dir" * path.is_dir()
        return {"path": name, "md5": md5}

    stages = {}
    for stage, (reads, params) in READS.items():
        output = made_by()[stage]
        outs = [output.as_posix(), *([manifest_path(output).as_posix()] if output.is_file() else [])]
        deps = [*map(entry, reads), {"path": "stages/x.py", "md5": "0"}]
        stages[stage] = {"outs": [*map(entry, outs)], "deps": deps, "params": {"profiles/own.yaml": params}}
    Path("dvc.lock").write_text(json.dumps({"schema": "2.0", "stages": stages}))  # JSON is YAML


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A whole run."""
    shutil.copytree(SMALL, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for stage in READS:
        for name, what in contents(stage).items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_bytes(what if isinstance(what, bytes) else jsonl_line(what).encode())
        record_stage(stage)
    lock()
    return tmp_path


def states(picture: dict[str, Any]) -> dict[tuple[str, str], str]:
    """State by stage and path; of a path both written and read by a stage there is none."""
    links = [*picture["links"], *(link for step in picture["steps"] for link in step.links)]
    return {(link.stage, link.path): link.state for link in links}


def test_a_pair_back_to_its_arms_and_seeds(run: Path) -> None:
    picture = trace.trace(PAIR)
    chosen, rejected = picture["pair"]["chosen"], picture["pair"]["rejected"]
    assert (chosen["arm"], chosen["temperature"], chosen["system"]) == ("cool", 0.5, "Be brief.")
    assert (rejected["arm"], rejected["top_p"], rejected["tokens"]) == ("warm", 0.9, 5)
    assert chosen["seed"] == request_seed(SEED, "rollout", "q1", "0")
    assert (chosen["reward"], rejected["reward"], picture["pair"]["margin"]) == (1.25, 0.5, 0.75)
    assert picture["notes"] == [
        "Drawn from the SFT policy (its adapter: as recorded).",
        "The DPO adapter was trained on this pair, unless it is longer than dpo.max_tokens.",
        # The earlier of two equal steps.
        "The DPO adapter kept is that of step 8 of 16, the best on validation; what came after it had no effect.",
    ]
    assert set(states(picture).values()) == {AS_RECORDED} and not picture["broken"]
    steps = {step.stage: step for step in picture["steps"]}
    rounds = ["dpo@dpo", "preference@dpo", "coherence@dpo", "rollout@dpo"]
    assert list(steps) == [*rounds, "sft", "base", "prepare"]
    assert {step.profile for step in picture["steps"]} == {"own"}
    # What one stage names, another one made.
    read = {link.path: link.recorded for link in steps["dpo@dpo"].links if link.role == "read"}
    assert read["checkpoints/sft_lora"] == steps["sft"].identity
    assert read["data/coherence_preferences/dpo.jsonl"] == steps["preference@dpo"].identity


@pytest.mark.parametrize("width", [80, 120])
def test_what_a_person_sees(run: Path, width: int) -> None:
    def shown(name: str) -> str:
        return words(printed(trace.main, name, width=width, text=True))

    text = shown(PAIR)
    for part in (QUESTION, "correctness pair, margin 0.750", "system Be brief. –", "seed 3", "beta 0.1",
                 "The DPO adapter was trained on this pair", "step 8 of 16", "chosen #### 0 rejected #### 1",
                 "id a/b, revision c0ffee", "wrote 1 more, as recorded", "read checkpoints/sft_lora",
                 "Every link that could be checked holds."):  # fmt: skip
        assert part in text, part
    text = shown("p1")
    assert text.count("5 ✓ 4 stop 1 of 2 right") == 3 and "dpo #### 5 Where it came from" in text
    text = shown("q1")
    assert "training question, gold 0" in text and "explain q1` shows its trajectories" in text


def change_lock(stage: str, kind: str, path: str) -> None:
    """Another sum of one path in one entry of dvc.lock."""
    lock = json.loads(Path("dvc.lock").read_text())
    (entry,) = (one for one in lock["stages"][stage][kind] if one["path"] == path)
    entry["md5"] = "0" * 32
    Path("dvc.lock").write_text(json.dumps(lock))


def other_weights() -> None:
    Path("checkpoints/base/model.safetensors").write_bytes(b"bose")


def trained_again() -> None:
    Path("checkpoints/sft_lora/adapter_model.safetensors").write_bytes(b"new")
    record_stage("sft")


def absent_and_drawn_again() -> None:
    write_jsonl(Path("data/rollouts/dpo.jsonl"), [{"id": "other"}])
    record_stage("rollout@dpo")
    Path("data/rollouts/dpo.jsonl").unlink()
    Path("dvc.lock").unlink()


def lock_of_another_run() -> None:
    change_lock("rollout@dpo", "outs", "data/rollouts/dpo.manifest.json")


def absent_and_two_in_the_lock() -> None:
    change_lock("dpo@dpo", "deps", "checkpoints/sft_lora")
    for folder in ("dpo_coherence_lora/dpo", "sft_lora"):
        shutil.rmtree(Path("checkpoints") / folder)


CHANGES = [
    (lambda: LAST.pairs.write_text("{}"), "p1", "dpo@dpo", "data/coherence_preferences/dpo.jsonl", DIFFERS),
    (other_weights, "p1", "base", "checkpoints/base/model.safetensors", DIFFERS),
    (trained_again, "p1", "dpo@dpo", "checkpoints/sft_lora", DIFFERS),
    (lock_of_another_run, "q1", "rollout@dpo", "data/rollouts/dpo.manifest.json", DIFFERS),
    (absent_and_drawn_again, "q1", "coherence@dpo", "data/rollouts/dpo.jsonl", UNLIKE),
    (absent_and_two_in_the_lock, PAIR, "dpo@dpo", "checkpoints/sft_lora", UNLIKE),
]


@pytest.mark.parametrize(("change", "name", "stage", "path", "state"), CHANGES)
def test_a_broken_chain_is_named_and_fails(
    run: Path, change: Callable[[], object], name: str, stage: str, path: str, state: str
) -> None:
    printed(trace.main, name)
    change()
    assert states(trace.trace(name))[stage, path] == state
    with pytest.raises(UserError, match=rf"{name}: the chain is broken: .*{re.escape(state)}"):
        printed(trace.main, name)


def test_a_record_that_is_not_its_trajectorys(run: Path) -> None:
    """Manifests hold, and still the pair has another text, reward or seed than the files of trajectories."""

    def again(stage: str, path: str, change: Callable[[dict[str, Any]], object]) -> None:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        change(rows[0])
        write_jsonl(Path(path), rows)
        for later in list(READS)[list(READS).index(stage) :]:
            record_stage(later)
        lock()

    again("rollout@dpo", "data/rollouts/dpo.jsonl", lambda row: row["trajectories"][1].update(seed=7))
    found = trace.trace(PAIR)
    assert found["broken"] == [
        "data/rollouts/dpo.jsonl (rejected as drawn), read by pair, differs from what lies here now"
    ]
    again(
        "coherence@dpo", "data/regime_w_rollouts/dpo.jsonl", lambda row: row["trajectories"][1].update(seed=7)
    )
    assert [words.partition(",")[0] for words in trace.trace(PAIR)["broken"]] == ["rejected seed"]
    again("preference@dpo", "data/coherence_preferences/dpo.jsonl", lambda row: row.update(chosen_reward=9.0))
    assert len(trace.trace(PAIR)["broken"]) == 2


def test_what_is_not_here_is_said_and_compared_by_what_both_ends_recorded(run: Path) -> None:
    for name in ("base", "sft_lora", "dpo_coherence_lora/dpo"):
        shutil.rmtree(Path("checkpoints") / name)
    Path("data/rollouts/dpo.jsonl").unlink()
    found = states(trace.trace("p1"))
    assert found["evaluate@dpo", "checkpoints/dpo_coherence_lora/dpo"] == ALIKE
    assert found["dpo@dpo", "checkpoints/sft_lora"] == ALIKE  # both by dvc.lock
    assert found["dpo@dpo", "data/coherence_preferences/dpo.jsonl"] == AS_RECORDED  # by its md5
    assert found["coherence@dpo", "data/rollouts/dpo.jsonl"] == ALIKE  # its manifest is here
    assert found["base", "checkpoints/base"] == UNCHECKED
    assert states(trace.trace(PAIR))["pair", "data/rollouts/dpo.jsonl (chosen as drawn)"] == UNCHECKED
    text = words(printed(trace.main, PAIR))
    assert "(no manifest here; by dvc.lock)" in text and "was trained on this pair" in text
    assert "could not be: their files are not here" in text
    Path("dvc.lock").unlink()
    steps = [step.stage for step in trace.trace("q1")["steps"]]
    assert steps == ["preference@dpo", "coherence@dpo", "rollout@dpo", "prepare"]
    assert "does not say whether a DPO adapter was trained on this pair" in words(printed(trace.main, PAIR))


def test_step_zero_is_the_sft_adapter(run: Path) -> None:
    Path("metrics/kept/dpo.json").write_text('{"kept": 0, "last": 16}')
    record_stage("dpo@dpo")
    assert "the SFT adapter itself, so no pair changed it" in trace.trace(PAIR)["notes"][-1]


def test_records_edited_by_hand(run: Path) -> None:
    """Whatever stands in them, something is shown and the chain is broken."""
    for path, change in (
        ("data/rollouts/dpo.jsonl", {"trajectories": [7, {}, {"id": "q1/0", "seed": "x", "text": 3}]}),
        (
            "data/regime_w_rollouts/dpo.jsonl",
            {"trajectories": [None, {"id": "q1/0", "s_wm": "?", "correct": "no"}]},
        ),
        ("data/platinum_eval/dpo.jsonl", {"samples": [3, {}], "answer": [1]}),
        ("data/coherence_preferences/dpo.jsonl", {"margin": "wide", "chosen_reward": None}),
    ):
        (row,) = map(json.loads, Path(path).read_text().splitlines())
        write_jsonl(Path(path), [{**row, **change}])
        for name in (PAIR, "q1", "p1"):
            with pytest.raises(UserError, match="the chain is broken"):
                printed(trace.main, name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("q1/0", "neither rollout nor evaluate asked a question 'q1/0'; the nearest ids are q1, p1"),
        ("q1/0>7", "no pair 'q1/0>7'; the nearest ids are q1/0>1"),
    ],
)
def test_ids_that_nothing_has(run: Path, name: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        trace.main(name)


def test_missing_and_damaged_files(run: Path) -> None:
    manifest = Path("checkpoints/sft_lora/manifest.json")
    for text, said in (
        ("{", "damaged JSON"),
        ("[]", "no manifest of this pipeline"),
        ('{"stage": 1}', "stage is wrong"),
    ):
        manifest.write_text(text)
        with pytest.raises(UserError, match=said):
            trace.main("p1")
    manifest.unlink()
    Path("dvc.lock").write_text("stages: [")
    with pytest.raises(UserError, match=r"dvc\.lock: cannot be read"):
        trace.main("p1")
    shutil.rmtree("data/platinum_eval")
    with pytest.raises(UserError, match=r"data/platinum_eval/dpo\.jsonl; `dvc pull` fetches"):
        trace.main("p1")
    Path("data/coherence_preferences/dpo.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"not here: data/coherence_preferences/dpo\.jsonl; `dvc pull` fetches"
    ):
        trace.main(PAIR)
