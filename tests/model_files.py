"""Small random models in the same files as Abel-7B-002 and DeepSeek-R1-Distill-Llama-8B on the hub."""

from __future__ import annotations

import json
from collections import OrderedDict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM


def problems() -> list[dict[str, str]]:
    """Short questions whose answers are 4 or 5, so that even a weak model is sometimes right."""
    names = ["Ann", "Ben", "Eve", "Max", "Tom", "Zoe"]
    things = ["pens", "eggs", "cups", "hats"]
    sums = [(1, 3), (2, 2), (3, 1), (1, 4), (2, 3), (3, 2), (4, 1)]
    rows = []
    for (a, b), name, thing in product(sums, names, things):
        question = f"{name} has {a} {thing} and gets {b}. How many now?"
        rows.append(
            {"question": question, "answer": f"{name} has {a}+{b}=<<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}"}
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return [rows[place] for place in order]


def corpus(styles: dict[str, str]) -> list[str]:
    """The texts from which the tokenizer is trained: the prompts and the problems."""
    return [*styles.values(), *(f"{row['question']} {row['answer']}" for row in problems())]


# ---- Abel ---------------------------------------------------------------------------------------------


def abel_files(folder: Path, styles: dict[str, str]) -> None:
    """The files of Abel-7B-002: three fp32 pickle shards with an index, and a Llama-2 style tokenizer."""
    tokenizer = llama2_tokenizer(corpus(styles))
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {f"<extra_{n}>": tokenizer.get_vocab_size() - 32 + n for n in range(32)}
    write(folder / "added_tokens.json", added)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write(folder / "special_tokens_map.json", special)
    # Its pad token is its end token, so that training could not tell padding from an end.
    wanted = {"tokenizer_class": "LlamaTokenizer", "model_max_length": 2048, "pad_token": "</s>"}
    write(folder / "tokenizer_config.json", {**special, **wanted})
    # The embeddings have more rows than there are tokens.
    vocab = -(-tokenizer.get_vocab_size() // 64) * 64 + 64
    shape = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": vocab, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
        "sliding_window": 4096, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**shape, initializer_range=0.2))
    older = {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu",
        "rope_theta": 10000.0, "initializer_range": 0.02, "torch_dtype": "float32", "use_cache": False,
        "transformers_version": "4.34.0",
    }  # fmt: skip
    write(folder / "config.json", {**shape, **older})
    generation = {
        "_from_model_config": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "transformers_version": "4.34.0",
    }
    write(folder / "generation_config.json", generation)
    weight_map, total = {}, 0
    for place, names in enumerate(thirds(list(model.state_dict())), start=1):
        file = f"pytorch_model-{place:05d}-of-00003.bin"
        shard = OrderedDict((name, model.state_dict()[name].clone()) for name in names)
        torch.save(shard, folder / file)
        weight_map |= dict.fromkeys(names, file)
        total += sum(tensor.numel() * 4 for tensor in shard.values())
    write(
        folder / "pytorch_model.bin.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def llama2_tokenizer(texts: list[str]) -> Tokenizer:
    """BPE on `▁` words with bytes for what is unknown (line breaks among them), digits apart, <s> first."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "removed"), pre_tokenizers.Digits(True), pre_tokenizers.Metaspace()]
    )
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=480, special_tokens=first, show_progress=False)
    )
    made = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in made["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=made["vocab"], merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in first[:3]])
    tokenizer.add_tokens([AddedToken(f"<extra_{n}>", normalized=False) for n in range(32)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


# ---- R1 -----------------------------------------------------------------------------------------------

BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
R1_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% else %}{{ '<｜Assistant｜>' + message['content'].split('</think>')[-1] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)


def r1_files(folder: Path, styles: dict[str, str]) -> None:
    """The files of DeepSeek-R1-Distill-Llama-8B: two bf16 safetensors shards, its tokenizer and template."""
    tokenizer = llama3_tokenizer(corpus(styles))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "add_eos_token": False,
        "clean_up_tokenization_spaces": False, "model_max_length": 16384, "chat_template": R1_TEMPLATE,
        "bos_token": added_token(BEGIN), "eos_token": added_token(END), "pad_token": added_token(END),
    }  # fmt: skip
    write(folder / "tokenizer_config.json", config)
    ids = {"bos_token_id": tokenizer.token_to_id(BEGIN), "eos_token_id": tokenizer.token_to_id(END)}
    shape = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": tokenizer.get_vocab_size() + 40, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072, "tie_word_embeddings": False, **ids,
    }  # fmt: skip
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**shape, rope_parameters={**scaling, "rope_theta": 500000.0}, initializer_range=0.2)
    ).bfloat16()
    older = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "rope_theta": 500000.0, "rope_scaling": scaling, "attention_bias": False, "mlp_bias": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0", "use_cache": True,
    }  # fmt: skip
    write(folder / "config.json", {**shape, **older})
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "transformers_version": "4.39.3"}
    write(folder / "generation_config.json", {"_from_model_config": True, **ids, **sampling})
    weight_map = {}
    names = list(model.state_dict())
    for place, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"model-{place:05d}-of-000002.safetensors"
        save_file(
            {name: model.state_dict()[name].clone() for name in part},
            folder / file,
            metadata={"format": "pt"},
        )
        weight_map |= dict.fromkeys(part, file)
    write(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def llama3_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE with R1's added tokens; <think> and </think> are not special, so they stay in texts."""
    words = Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=450, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    for name, special in {
        BEGIN: True, END: True, "<|finetune_right_pad_id|>": True, "<｜▁pad▁｜>": True,
        "<｜User｜>": False, "<｜Assistant｜>": False, "<think>": False, "</think>": False,
    }.items():  # fmt: skip
        tokenizer.add_tokens([AddedToken(name, normalized=False, special=special)])
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, begin)]
    )
    return tokenizer


def added_token(name: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"__type": "AddedToken", "content": name, **flags}


# ---- Both ---------------------------------------------------------------------------------------------


def thirds(names: list[str]) -> list[list[str]]:
    size = -(-len(names) // 3)
    return [names[start : start + size] for start in range(0, len(names), size)]


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
