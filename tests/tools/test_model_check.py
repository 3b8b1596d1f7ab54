"""check on models from elsewhere and on questions too long for them. tests/checkpoint/test_look.py has the rest."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants
from ruamel.yaml import YAML

from stages import base, evaluate, rollout, sft
from stages.policy.adapter import load_tokenizer
from stages.run.errors import UserError
from stages.run.files import read_jsonl, write_jsonl
from stages.run.params import load_params
from stages.run.paths import CHANGED, PLATINUM, TESTS, TRAIN, VALID
from stages.tools import ask, check
from stages.tools.model_check import find_model
from stages.train.selection import Selection
from tests.families import make_place

REVISION = "1" * 40


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a small GPT-2 of 512 positions in `mine`, and an empty cache of the hub."""
    root = tmp_path / "place"
    root.mkdir()
    make_place("gpt2", root)
    monkeypatch.chdir(root)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("NVIDIA", "WINDOWS"):
        monkeypatch.setattr(check, name, tmp_path / "no-driver")
    return root


def update(**sections: dict[str, Any]) -> None:
    """Set keys of the profile's sections."""
    path, yaml = Path("profiles/small.yaml"), YAML()
    values = yaml.load(path.read_text(encoding="utf-8"))
    for name, keys in sections.items():
        values[name] = keys if name == "model" else {**values[name], **keys}
    yaml.dump(values, path)


def run_check() -> tuple[str, str]:
    """What `check` prints, and its error."""
    with contextlib.redirect_stdout(io.StringIO()) as stream, pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "400")
        try:
            check.main()
        except UserError as error:
            return stream.getvalue(), str(error)
    return stream.getvalue(), ""


# ---- The hub's cache ----------------------------------------------------------------------------------


def test_a_model_in_the_hubs_cache(place: Path) -> None:
    """Looked at without the hub once it is whole there, and refused as `base` would; unknown before that."""
    update(model={"source": "hub", "id": "me/mine", "revision": REVISION, "dtype": "float32"})
    spec: Any = load_params().model
    snapshot = Path(constants.HF_HUB_CACHE) / "models--me--mine" / "snapshots" / REVISION
    shutil.copytree("mine", snapshot)
    text, error = run_check()
    assert (
        not error
        and "model.id me/mine" in text
        and "base will say: pad token: <pad>, new, in a new row" in text
    )
    settings = json.loads((snapshot / "tokenizer_config.json").read_text())
    (snapshot / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    assert run_check()[1].startswith("model.id me/mine: ") and "names no end token" in run_check()[1]

    # A part of it: config and tokenizer, or an index whose files are still to come.
    (snapshot / "model.safetensors").rename(snapshot / "model-00002-of-00002.safetensors")
    names = dict.fromkeys(["transformer.wte.weight"], "model-00001-of-00002.safetensors")
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (snapshot / "tokenizer_config.json").write_text(json.dumps(settings))
    assert find_model(spec, print)[1] is not None, "an index that does not fit is known before the files come"
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    assert find_model(spec, print) == (None, None)
    shutil.rmtree(snapshot)
    assert find_model(spec, print) == (None, None)


# ---- Questions too long -------------------------------------------------------------------------------

LONG = "Ann has many apples. "


def row(name: str, times: int = 1) -> dict[str, str]:
    return {"id": name, "question": LONG * times, "solution": "<<1+1=2>>2\n#### 2", "gold": "2"}


@pytest.fixture
def made(place: Path) -> Path:
    """The same after `base`, with questions of which some are too long."""
    base.main()
    TRAIN.parent.mkdir(parents=True)
    write_jsonl(TRAIN, [row("train-0"), row("train-1", 200), row("train-2"), row("train-3", 90)])
    write_jsonl(VALID, [row("valid-0")])
    write_jsonl(PLATINUM, [row("platinum-0"), row("platinum-1", 45)])
    write_jsonl(CHANGED, [row("platinum-1~1", 45) | {"of": "platinum-1"}])
    write_jsonl(TESTS, [row("svamp-0", 45) | {"test": "svamp"}])
    for path in (TRAIN, VALID, PLATINUM):
        write_manifest(path.parent)
    return place


def write_manifest(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text("{}")


def test_check_counts_them(made: Path) -> None:
    """By file, with the setting that takes the rest of the context; for a shipped model too."""
    text, error = run_check()
    assert error == (
        "data/gsm8k/train.jsonl: 2 questions too long for the model's context of 512 tokens (with "
        "rollout.max_new_tokens, 64, for the answer); train-1 is the longest, 2,207; leave them out, lower "
        "rollout.max_new_tokens, or take a model with a longer context (and 3 more above)"
    )
    assert "data/gsm8k/platinum.jsonl: 1 question too long" in text and "valid.jsonl" not in text
    assert "data/gsm8k/changed.jsonl: 1 question too long" in text
    assert "data/gsm8k/tests.jsonl: 1 question too long" in text
    update(model={"source": "shipped"})
    assert "train.jsonl: 2 questions too long for the model's context of 512 tokens" in run_check()[1]
    rows = list(read_jsonl(TRAIN))
    write_jsonl(TRAIN, rows[::2])
    write_jsonl(PLATINUM, [row("platinum-0")])
    write_jsonl(CHANGED, [])
    write_jsonl(TESTS, [])
    assert run_check()[1] == ""


def test_check_counts_what_is_too_long_for_one_round(made: Path) -> None:
    """A round may have arms and lengths of its own."""
    write_jsonl(TRAIN, [row("train-0")])
    for path in (PLATINUM, CHANGED, TESTS):
        path.unlink()
    assert run_check()[1] == ""
    path, yaml = Path("params.yaml"), YAML()
    values = yaml.load(path.read_text(encoding="utf-8"))
    values["rounds"]["dpo"] |= {
        "rollout": {"max_new_tokens": 505},
        "dpo": {"select": {"max_new_tokens": 506}},
    }
    yaml.dump(values, path)
    text, error = run_check()
    assert (
        "train.jsonl: 1 question too long" in text + error
        and "valid.jsonl: 1 question too long" in text + error
    )
    assert "rounds.dpo.rollout.max_new_tokens" in text + error
    assert "lower rounds.dpo.dpo.select.max_new_tokens" in text + error


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (sft.main, "train.jsonl: 2 questions too long for the model's context of 512 tokens; train-1 is the longest"),
        (lambda: rollout.main("dpo"), "train.jsonl: 2 questions too long for the model's context of 512 tokens (w"),
        (lambda: evaluate.main("base"), "platinum.jsonl: 1 question too long for the model's context of 512 tokens (w"),
    ],
    ids=["sft", "rollout", "evaluate"],
)  # fmt: skip
def test_a_stage_refuses_them_first(
    made: Path, monkeypatch: pytest.MonkeyPatch, stage: Callable[[], None], message: str
) -> None:
    """Before anything is trained or generated."""
    write_manifest(Path("checkpoints/sft_lora"))
    for module in (rollout, evaluate):
        monkeypatch.setattr(module, "open_engine", None)
    with pytest.raises(UserError) as error:
        stage()
    assert message in str(error.value)


def test_a_training_row_beyond_the_context(made: Path) -> None:
    """The question fits, with its solution it does not, and sft.max_tokens would let it through."""
    write_jsonl(TRAIN, [row("train-0"), {**row("train-1", 40), "solution": LONG * 30 + "\n#### 2"}])
    update(sft={"max_tokens": 4096})
    with pytest.raises(UserError) as error:
        sft.main()
    assert "sft.max_tokens: the longest row has " in str(error.value)
    assert str(error.value).endswith("and the model's context is 512; lower sft.max_tokens to that")


def test_the_selection_and_ask_refuse_one(made: Path) -> None:
    run: Any = SimpleNamespace(params=load_params(), work=made)
    tokenizer = load_tokenizer()
    Selection(run, "dpo", tokenizer, {}, lambda model: None)  # type: ignore[arg-type, return-value]
    write_jsonl(VALID, [row("valid-0", 45)])
    with pytest.raises(
        UserError, match=r"valid\.jsonl: 1 question too long for .+ \(with dpo\.select\.max_new_tokens, 64"
    ):
        Selection(run, "dpo", tokenizer, {}, lambda model: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(
        UserError, match=r"ask: the question has 1,\d\d\d tokens with its prompt, which with 64 new ones"
    ):
        ask.main(LONG * 100, "base", 0.0, 0, None)


# ---- Chat templates -----------------------------------------------------------------------------------


def test_a_template_that_refuses_a_system_line(place: Path) -> None:
    """As Gemma's does: one line, not a traceback."""
    settings = json.loads(Path("mine/tokenizer_config.json").read_text())
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    Path("mine/tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    update(prompt={"chat": True, "system": "Be exact."})
    assert run_check()[1] == (
        "prompt: the model's chat template refuses system and user turns (System role not supported); leave out what "
        "it refuses (prompt.system, and the arms' own), or set chat: false"
    )
