"""merge: the same weights as PEFT's own merging in fp32, whatever the shards; what is not understood is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from stages.core.errors import UserError
from stages.core.policy import adapter_config, adapter_weights, save_adapter
from stages.tools.merge import INDEX, WEIGHTS, Lora, merge, precision_of, read_lora, total_bytes, weight_files

GIB = 2**30
LINEAR = "model.layers.0.self_attn.q_proj"


def make(
    folder: Path, dtype: torch.dtype = torch.float32, tied: bool = False, shard: str = "1GB", **lora: Any
) -> None:
    """A base of two layers with more embeddings than tokens, and an adapter on all its linear layers."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=70, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder / "base", max_shard_size=shard)
    options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
    tuned = get_peft_model(model, LoraConfig(**options))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    (folder / "adapter").mkdir()
    save_adapter(adapter_weights(tuned), adapter_config(tuned), folder / "adapter")


def merged_by_peft(folder: Path) -> dict[str, torch.Tensor]:
    """PEFT's merging, with base and adapter in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    state: dict[str, torch.Tensor] = (
        PeftModel.from_pretrained(model, str(folder / "adapter")).merge_and_unload().state_dict()
    )
    return state


def written(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def merge_all(
    folder: Path, dtype: torch.dtype | None = None, shard_bytes: int = GIB
) -> dict[str, torch.Tensor]:
    (folder / "out").mkdir(exist_ok=True)
    merge(folder / "base", read_lora(folder / "adapter"), folder / "out", dtype, shard_bytes)
    return written(folder / "out")


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_same_weights_as_pefts_merging(tmp_path: Path, tied: bool, rslora: bool) -> None:
    make(tmp_path, tied=tied, use_rslora=rslora)
    found, wanted = merge_all(tmp_path), merged_by_peft(tmp_path)
    assert ("lm_head.weight" in found) is not tied  # tied weights are there once, as in the base
    base = load_file(tmp_path / "base" / WEIGHTS)
    assert found.keys() == base.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, wanted[name], atol=1e-6, rtol=0)
        assert torch.equal(weight, base[name]) is ("_proj" not in name), name


def test_the_folder_computes_what_the_unmerged_policy_does(tmp_path: Path) -> None:
    make(tmp_path, tied=True)
    merge_all(tmp_path, shard_bytes=6000)
    for name in ("config.json", "generation_config.json"):
        (tmp_path / "out" / name).write_bytes((tmp_path / "base" / name).read_bytes())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    unmerged = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        wanted = unmerged(input_ids=ids).logits
        with unmerged.disable_adapter():
            before = unmerged(input_ids=ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert (wanted - before).abs().max() > 0.1  # the adapter does something


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bf16_base_is_merged_in_fp32_and_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    make(tmp_path, dtype=torch.bfloat16)
    found, exact = merge_all(tmp_path, dtype), merged_by_peft(tmp_path)
    for name, weight in found.items():
        assert weight.dtype == dtype
        # Half a step of the precision, and a little for sums in another order.
        step = torch.finfo(dtype).eps * exact[name].abs().clamp(min=2.0**-14)
        assert ((weight.float() - exact[name]).abs() <= 0.501 * step + 1e-7).all(), name
    # None keeps the base's own.
    assert {weight.dtype for weight in merge_all(tmp_path).values()} == {torch.bfloat16}


def test_what_rounding_costs_is_measured(tmp_path: Path) -> None:
    """bf16 has steps of 1/128 at 1: a change of 1/1024 is lost whole, one of 1/64 not at all."""
    save_file({"a.weight": torch.ones(4, 2), "b.weight": torch.ones(4, 2)}, tmp_path / WEIGHTS)
    one = torch.ones(1, 2), torch.ones(4, 1)
    (tmp_path / "out").mkdir()
    lost = merge(tmp_path, Lora(1 / 1024, {"a.weight": one}), tmp_path / "out", torch.bfloat16, GIB)
    assert lost.rounding == pytest.approx(1)
    assert torch.equal(
        load_file(tmp_path / "out" / WEIGHTS)["a.weight"], torch.ones(4, 2, dtype=torch.bfloat16)
    )
    kept = merge(tmp_path, Lora(1 / 64, {"b.weight": one}), tmp_path / "out", torch.bfloat16, GIB)
    assert kept.rounding == 0
    assert load_file(tmp_path / "out" / WEIGHTS)["b.weight"].float().unique().item() == 1 + 1 / 64
    assert merge(tmp_path, None, tmp_path / "out", None, GIB).rounding is None


def test_shards(tmp_path: Path) -> None:
    """No file is larger than asked but for one large tensor; the index names all; a sharded base is read alike."""
    make(tmp_path, shard="20KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    whole = merge_all(tmp_path)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [WEIGHTS]
    (tmp_path / "out" / WEIGHTS).unlink()
    limit = 7000
    parts = merge_all(tmp_path, shard_bytes=limit)
    assert parts.keys() == whole.keys() == weight_files(tmp_path / "base").keys()
    assert all(torch.equal(parts[name], weight) for name, weight in whole.items())
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert (
        index["metadata"]["total_size"]
        == sum(w.nbytes for w in whole.values())
        == total_bytes(tmp_path / "base", None)
    )
    assert total_bytes(tmp_path / "base", torch.float16) * 2 == index["metadata"]["total_size"]
    for file in set(index["weight_map"].values()):
        with safe_open(tmp_path / "out" / file, "pt") as tensors:
            names = list(tensors.keys())
        assert all(index["weight_map"][name] == file for name in names)
        assert sum(whole[name].nbytes for name in names) <= limit or len(names) == 1
    assert index["weight_map"].keys() == whole.keys()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"a_setting_of_tomorrow": 1}, "a_setting_of_tomorrow"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 5}, "rank 5"),
    ],
)
def test_other_adapters_are_refused_by_name(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    make(tmp_path)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=named):
        read_lora(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 70)}, "lora_embedding_A"),
        ({f"base_model.model.{LINEAR}.lora_magnitude_vector": torch.ones(32)}, "lora_magnitude_vector"),
        ({f"base_model.model.{LINEAR}.lora_A.weight": torch.ones(4, 32)}, "do not fit"),
        (
            {f"base_model.model.x.{half}.weight": torch.ones(4, 4) for half in ("lora_A", "lora_B")},
            r"changes x\.weight, which is not among",
        ),
        (
            {f"base_model.model.{LINEAR}.{half}.weight": torch.ones(4, 4) for half in ("lora_A", "lora_B")},
            "of another base",
        ),
    ],
)
def test_matrices_that_do_not_fit_are_refused(tmp_path: Path, tensors: dict[str, Any], named: str) -> None:
    make(tmp_path)
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(UserError, match=named):
        merge_all(tmp_path)


def test_damaged_files_and_too_large_numbers(tmp_path: Path) -> None:
    make(tmp_path)
    adapter = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = adapter.read_bytes()
    adapter.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        read_lora(tmp_path / "adapter")
    adapter.write_bytes(whole)
    weights = load_file(tmp_path / "base" / WEIGHTS)
    weights["model.norm.weight"][0] = 70_000
    save_file(weights, tmp_path / "base" / WEIGHTS)
    with pytest.raises(UserError, match=r"model\.norm\.weight: holds 70,000, too large for fp16"):
        merge_all(tmp_path, torch.float16)
    assert math.isfinite(float(merge_all(tmp_path, torch.bfloat16)["model.norm.weight"][0]))
    (tmp_path / "base" / WEIGHTS).write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        merge_all(tmp_path)


def test_the_precision_a_folder_declares(tmp_path: Path) -> None:
    for config, wanted in (
        ({"dtype": "bfloat16"}, "bf16"),
        ({"torch_dtype": "float16"}, "fp16"),
        ({}, "fp32"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert precision_of(tmp_path) == wanted
    (tmp_path / "config.json").write_text('{"dtype": "float8"}')
    with pytest.raises(UserError, match="float8"):
        precision_of(tmp_path)
