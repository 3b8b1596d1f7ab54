"""What `base` makes of models from elsewhere: tokens with a role, leftovers in configs and folders, quantized weights.

Each fault is built into a small random model of a family (tests/families.py), and `check` must say the same of it.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from stages import base
from stages.run.errors import UserError
from stages.tools import check
from tests.families import CHATML, FAMILIES, Family, make_model

REPO = Path(__file__).resolve().parents[2]
TEXTS = ["Question: Ann has 3 bags of 4 apples and eats 2. How many are left?\nAnswer:\n#### 10"] * 3
BASE, MODEL = Path("checkpoints/base"), Path("mine")


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with the tests' own parameters, whose profile takes the model from `mine`."""
    shutil.copytree(REPO / "tests/small", tmp_path, dirs_exist_ok=True)
    (tmp_path / "scorer.py").write_text("def score_group(question, trajectories): ...\n")
    monkeypatch.chdir(tmp_path)
    for name in ("NVIDIA", "WINDOWS"):
        monkeypatch.setattr(check, name, tmp_path / "no-driver")
    path, yaml = Path("profiles/small.yaml"), YAML()
    values = yaml.load(path.read_text(encoding="utf-8"))
    values["model"] = {"source": "directory", "dtype": "float32"}
    yaml.dump(values, path)


def make(name: str = "llama3", **changes: Any) -> Family:
    """A small model of this family in `mine`, with `changes` to what makes it up."""
    family = replace(FAMILIES[name], **changes)
    make_model(family, MODEL, TEXTS)
    return family


def edit(name: str, **values: Any) -> None:
    """Set keys of a JSON file of the model; None removes one."""
    path = MODEL / name
    content = (json.loads(path.read_text()) if path.is_file() else {}) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def checked() -> str:
    """What `check` prints, and its error."""
    with contextlib.redirect_stdout(io.StringIO()) as stream, pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "400")
        try:
            check.main()
        except UserError as error:
            print(error)
    return stream.getvalue()


def taken(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], Any, dict[str, torch.Tensor]]:
    """The lines that `base` says, which `check` said before, and the tokenizer and the weights that it wrote."""
    before = checked()
    capsys.readouterr()
    base.main()
    *lines, last = capsys.readouterr().err.splitlines()
    assert "converted to" in last
    lines = [line.removeprefix("base  ") for line in lines]
    for line in lines:
        assert f"base will say: {line}\n" in before
    model, about = AutoModelForCausalLM.from_pretrained(BASE, output_loading_info=True)
    assert not any(about.values()), about
    tokenizer = AutoTokenizer.from_pretrained(BASE, local_files_only=True)
    pad = tokenizer.pad_token_id
    assert (
        pad is not None
        and pad != tokenizer.eos_token_id
        and pad < model.get_input_embeddings().weight.shape[0]
    )
    assert model.config.pad_token_id == model.generation_config.pad_token_id == pad
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0]
    return lines, tokenizer, load_file(BASE / "model.safetensors")


def refused() -> str:
    """The one line in which `base` and `check` refuse the model."""
    with pytest.raises(UserError) as error:
        base.main()
    line = str(error.value)
    assert "\n" not in line and len(line) < 400 and not BASE.exists()
    assert line.removeprefix("mine: ") in checked()
    return line


# ---- The pad token ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("gemma3", "<pad>, the tokenizer's own"),
        ("qwen3", "<|endoftext|>, the tokenizer's own"),
        ("qwen2.5", "<|vision_pad|>, a spare one of the tokenizer's (its own is the end token)"),
        ("llama3", "<|finetune_right_pad_id|>, a spare one of the tokenizer's (it has none of its own)"),
        ("pythia", "<|padding|>, a spare one of the tokenizer's (it has none of its own)"),
        ("phi3", "<|placeholder1|>, a spare one of the tokenizer's (its own is the end token)"),
        ("mistral", "<unk>, the one for unknown text (it has none of its own, and none is spare)"),
    ],
)
def test_the_pad_token_of_a_family(name: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Found among the tokens that are there, and the weights stay as they are."""
    make(name)
    lines, tokenizer, found = taken(capsys)
    assert lines == [f"pad token: {line}"]
    assert line.startswith(tokenizer.pad_token)
    wanted = load_file(MODEL / "model.safetensors")
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


SMOLLM2 = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<empty_output>")


@pytest.mark.parametrize(
    ("name", "changes", "line", "rows"),
    [
        ("gpt2", {}, "<pad>, new, in a new row", 1),  # tied
        ("pythia", {"first": ("<|endoftext|>",), "rows": 0}, "<pad>, new, in a new row", 1),  # untied
        ("gpt2", {"rows": 7}, "<pad>, new, in a free row", 0),
        ("llama3", {"first": SMOLLM2, "added": {}, "template": CHATML, "ends": (), "roles": dict.fromkeys(
            ("bos_token", "eos_token", "unk_token"), "<|endoftext|>")}, "<pad>, new, in a new row", 1),
    ],
    ids=["tied", "untied", "free row", "smollm2"],
)  # fmt: skip
def test_a_new_pad_token(
    name: str, changes: dict[str, Any], line: str, rows: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a spare one, the embeddings and the output layer get a row: the mean of the others, so never likely."""
    make(name, **changes)
    (said,), tokenizer, found = taken(capsys)
    assert said.startswith(
        f"pad token: {line} of the embeddings, {tokenizer.pad_token_id} (it has none of its own"
    )
    wanted = load_file(MODEL / "model.safetensors")
    assert found.keys() == wanted.keys()
    grown = [key for key in wanted if found[key].shape != wanted[key].shape]
    assert bool(grown) == bool(rows)
    for key in wanted:
        size = len(wanted[key])
        assert len(found[key]) == size + (rows if key in grown else 0)
        assert torch.equal(found[key][:size], wanted[key])
        if key in grown:
            torch.testing.assert_close(found[key][size], wanted[key].mean(0))
    text = "Ann has 3 <pad>."
    ids = AutoTokenizer.from_pretrained(MODEL)(text)["input_ids"]
    assert tokenizer("Ann has 3")["input_ids"] == ids[: len(tokenizer("Ann has 3")["input_ids"])]


@pytest.mark.parametrize(
    ("added", "template", "ends", "wanted"),
    [
        ({"<|reserved_1|>": True, "[PAD]": True}, None, (), "[PAD]"),
        ({"[UNUSED_TOKEN_0]": True, "<|x_pad|>": False, "<|y_pad|>": True}, None, (), "<|y_pad|>"),
        ({"<|image_pad|>": True, ">>UNUSED_1<<": True}, "{{ '<|image_pad|>' }}", (), ">>UNUSED_1<<"),
        ({"<extra_id_0>": False, "<|reserved_0|>": False}, None, ("<extra_id_0>",), "<|reserved_0|>"),
        ({"<｜▁pad▁｜>": True}, None, (), "<｜▁pad▁｜>"),
        ({"<|dummy_85|>": True, "<pad>": True}, None, ("<pad>",), "<|dummy_85|>"),
        ({"<|padre|>": True, "<|tool_call|>": True}, None, (), "<pad>"),
        ({"<pad>": True}, "{{ '<pad>' }}", (), "<|pad|>"),
    ],
)
def test_which_token_is_spare(
    added: dict[str, bool],
    template: str | None,
    ends: tuple[str, ...],
    wanted: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its text has the word; no end list and no template uses it; special ones first, and `pad` before `reserved`."""
    make(
        "gpt2",
        added={"<|endoftext|>": True, **added},
        template=template,
        ends=ends and ("<|endoftext|>", *ends),
    )
    (line,), tokenizer, _ = taken(capsys)
    assert tokenizer.pad_token == wanted and f"pad token: {wanted}, " in line


def test_a_pad_token_beyond_the_embeddings(capsys: pytest.CaptureFixture[str]) -> None:
    """The tokenizer's own, added by somebody who did not resize the model: it gets a row. Other tokens are refused."""
    make("mistral", added={"[PAD]": True}, rows=-1, roles={**FAMILIES["mistral"].roles, "pad_token": "[PAD]"})
    lines, tokenizer, found = taken(capsys)
    assert lines == ["pad token: [PAD], the tokenizer's own"]
    assert len(found["lm_head.weight"]) == tokenizer.pad_token_id + 1 == len(tokenizer)
    shutil.rmtree("checkpoints")
    make("mistral", added={"<|tool|>": True}, rows=-1)
    assert "more than the" in refused()


# ---- The end token, and what the configs leave over ---------------------------------------------------


def test_no_end_token() -> None:
    """Refused before anything is trained; the token that the config declares is named as a hint."""
    make("llama3")
    edit("tokenizer_config.json", eos_token=None)
    line = refused()
    assert line == (
        "mine: the tokenizer names no end token, so the model could not learn where an answer ends; name it in "
        'tokenizer_config.json, such as "eos_token": "<|end_of_text|>", which the model\'s config declares'
    )
    for name in ("config.json", "generation_config.json"):
        edit(name, eos_token_id=None)
    assert refused().endswith("name it in tokenizer_config.json")


LEFTOVERS: dict[str, Any] = {
    "do_sample": False, "min_p": 0.05, "typical_p": 0.9, "epsilon_cutoff": 3e-4, "eta_cutoff": 1e-3, "top_k": 20,
    "early_stopping": True, "num_beams": 1, "length_penalty": 0.5, "repetition_penalty": 1.3, "max_length": 40,
    "penalty_alpha": 0.6, "cache_implementation": "hybrid", "bad_words_ids": [[3]], "no_repeat_ngram_size": 3,
    "some_setting_of_tomorrow": {"a": 1},
}  # fmt: skip


def test_generation_config_keeps_token_ids_only(capsys: pytest.CaptureFixture[str]) -> None:
    make("llama3", generation=LEFTOVERS)
    edit("config.json", temperature=0.3, early_stopping=True, max_length=99)  # older models have some there
    _, tokenizer, _ = taken(capsys)
    saved = json.loads((BASE / "generation_config.json").read_text())
    ends = sorted(map(tokenizer.convert_tokens_to_ids, ("<|end_of_text|>", "<|eot_id|>")))
    assert {key: value for key, value in saved.items() if not key.startswith(("_", "transformers"))} == {
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    assert GenerationConfig.from_pretrained(BASE).repetition_penalty in (None, 1.0)
    assert not json.loads((BASE / "config.json").read_text()).keys() & {
        "temperature",
        "early_stopping",
        "max_length",
    }


def test_only_declared_tokens_end_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    """A config without an end token does not get the one of its class, 2 for Llama, which is a letter here."""
    make("llama3", ends=())
    (MODEL / "generation_config.json").unlink()
    edit("config.json", eos_token_id=None)
    _, tokenizer, _ = taken(capsys)
    assert json.loads((BASE / "generation_config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id
    assert json.loads((BASE / "config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id


def test_declared_text_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """A model made by hand declares what its class does by default: a letter, or no token at all."""
    make("llama3", ends=())
    edit("generation_config.json", eos_token_id=[2, 50256])
    edit("config.json", eos_token_id=50256, bos_token_id=50256)
    lines, tokenizer, _ = taken(capsys)
    assert lines[0] == "eos_token_id: 2, 50256 is no special token of the tokenizer's, so it ends nothing"
    assert json.loads((BASE / "generation_config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id


@pytest.mark.parametrize("value", ["</s>", [1, "</s>"], True, 2.5])
def test_an_end_token_that_is_none(value: Any) -> None:
    make("llama3")
    edit("generation_config.json", eos_token_id=value)
    assert (
        refused()
        == f"mine/generation_config.json: eos_token_id is {value!r}, which is no token id; correct it"
    )


# ---- Quantized, or not --------------------------------------------------------------------------------

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize("left", [AWQ, BITS, {"bits": 4}], ids=["awq", "bitsandbytes", "unnamed"])
def test_a_left_over_quantization_config(left: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    make("llama3")
    edit("config.json", quantization_config=left)
    (_, said), _, _ = taken(capsys)
    method = left.get("quant_method", "by an unknown method")
    assert (
        said
        == f"config.json says that the weights are quantized ({method}), but they are plain; that is left out"
    )
    assert "quantization_config" not in json.loads((BASE / "config.json").read_text())


def packed(tensors: dict[str, torch.Tensor], key: str) -> None:
    """As AWQ and GPTQ save a layer."""
    del tensors[key]
    stem = key.removesuffix("weight")
    tensors |= {f"{stem}qweight": torch.ones(8, 8, dtype=torch.int32), f"{stem}scales": torch.ones(8)}


@pytest.mark.parametrize(
    ("change", "config", "line"),
    [
        (packed, AWQ, "mine: the weights are quantized (awq), and only plain ones can be trained on, so take the"),
        (
            lambda tensors, key: tensors.update({key: tensors[key].to(torch.uint8), f"{key}.absmax": torch.ones(2)}),
            BITS, "down_proj.weight is uint8; only plain floating-point weights can be trained on, so take the model",
        ),
        (
            lambda tensors, key: tensors.update({key: tensors[key].to(torch.float8_e4m3fn), f"{key}_s": torch.ones(1)}),
            {"quant_method": "fp8"}, "down_proj.weight is float8_e4m3fn; only plain floating-point weights",
        ),
        (lambda tensors, key: tensors.update({key: tensors[key].to(torch.float8_e4m3fn)}), None, "float8_e4m3fn; only"),
    ],
    ids=["packed", "bitsandbytes", "fp8", "unsaid"],
)  # fmt: skip
def test_quantized_weights(change: Callable[..., None], config: dict[str, Any] | None, line: str) -> None:
    make("llama3")
    tensors = load_file(MODEL / "model.safetensors")
    change(tensors, "model.layers.0.mlp.down_proj.weight")
    save_file(tensors, MODEL / "model.safetensors", metadata={"format": "pt"})
    edit("config.json", quantization_config=config)
    assert line in refused()


def test_quantized_weights_by_their_index() -> None:
    """Seen in the index, so before any weights are downloaded."""
    make("llama3")
    (MODEL / "model.safetensors").rename(MODEL / "model-00001-of-00001.safetensors")
    names = [f"model.layers.0.mlp.{part}" for part in ("down_proj.qweight", "down_proj.scales")]
    edit("model.safetensors.index.json", weight_map=dict.fromkeys(names, "model-00001-of-00001.safetensors"))
    edit("config.json", quantization_config=AWQ)
    assert "model.safetensors.index.json: the weights are quantized (awq)" in refused()


# ---- Stale indexes, and names of older times -----------------------------------------------------------


def pickle() -> dict[str, torch.Tensor]:
    """Save the weights as one pickle in place of safetensors."""
    tensors = load_file(MODEL / "model.safetensors")
    (MODEL / "model.safetensors").unlink()
    torch.save(tensors, MODEL / "pytorch_model.bin")
    return tensors


@pytest.mark.parametrize(
    ("index", "whole", "line"),
    [
        (
            "model.safetensors.index.json", "model.safetensors",
            "model.safetensors.index.json names old-1.safetensors, which is not there; it is left out, and "
            "model.safetensors is taken",
        ),
        (
            "model.safetensors.index.json", "pytorch_model.bin",
            "model.safetensors.index.json names old-1.safetensors, which is not there; it is left out, and "
            "pytorch_model.bin is taken",
        ),
        (
            "pytorch_model.bin.index.json", "pytorch_model.bin",
            "pytorch_model.bin.index.json names old-1.safetensors, which is not there; it is left out, and "
            "pytorch_model.bin is taken",
        ),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_a_stale_index_beside_whole_weights(
    index: str, whole: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make("llama3")
    wanted = pickle() if whole == "pytorch_model.bin" else load_file(MODEL / whole)
    edit(index, weight_map={"a": "old-1.safetensors", "b": "old-2.safetensors"})
    lines, _, found = taken(capsys)
    assert lines[0] == line
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_an_index_whose_files_are_there_beside_whole_weights(capsys: pytest.CaptureFixture[str]) -> None:
    """The weights twice: the whole file is taken, as transformers would."""
    make("llama3")
    names = load_file(MODEL / "model.safetensors")
    (MODEL / "old-1.safetensors").write_bytes(b"of another model")
    edit("model.safetensors.index.json", weight_map=dict.fromkeys(names, "old-1.safetensors"))
    lines, _, _ = taken(capsys)
    assert lines[0] == (
        "model.safetensors.index.json stands beside the whole model.safetensors; it is left out, and "
        "model.safetensors is taken"
    )


def test_an_index_alone_whose_files_are_missing() -> None:
    """Not stale but incomplete."""
    make("llama3")
    names = load_file(MODEL / "model.safetensors")
    (MODEL / "model.safetensors").unlink()
    edit("model.safetensors.index.json", weight_map=dict.fromkeys(names, "model-00001-of-00001.safetensors"))
    assert refused().startswith("mine/model-00001-of-00001.safetensors: cannot be read (No such file")


def test_gpt2_as_it_was_published(capsys: pytest.CaptureFixture[str]) -> None:
    """Its names lack the prefix, and causal masks lie among the weights. The names stay; transformers reads them."""
    make("gpt2")
    tensors = load_file(MODEL / "model.safetensors")
    older = {key.removeprefix("transformer."): value for key, value in tensors.items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 512, 512) for layer in range(2)}
    masks |= {f"h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}
    save_file(older | masks, MODEL / "model.safetensors", metadata={"format": "pt"})
    _, _, found = taken(capsys)
    assert found.keys() == older.keys()
    assert torch.equal(found["wte.weight"][:-1], older["wte.weight"])
