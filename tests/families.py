"""Small random models of eight families, each with a config, a tokenizer and a chat template of its family's kind.

    make_family("qwen3", folder, texts)  # a model folder as on the hub; `texts` train the tokenizer

What differs between families and matters to the stages is as in the published models: the class, tied and untied
embeddings, fused layers, learned positions, sliding windows, the special tokens, which of them is the pad token, how
many rows the embeddings have beyond the tokens, and what generation_config.json says.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM

from stages.engine.transformers_engine import TransformersEngine
from stages.policy.adapter import load_policy
from stages.policy.request import Request, end_ids
from tests.model_files import problems

WIDTH: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.1,
}  # fmt: skip
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\\n' + message['content']"
    " + '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
PHI = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """What makes up a family: its model type and settings, its tokens (`text: special`), and their parts."""

    model_type: str
    settings: dict[str, Any]
    added: dict[str, bool]  # after the vocabulary, in order
    first: tuple[str, ...] = ()  # special tokens before it; sentencepiece-like vocabularies have some
    roles: dict[str, str] = field(default_factory=dict)  # bos_token, eos_token, ...
    template: str | None = None
    rows: int = 0  # embeddings beyond the tokens
    ends: tuple[str, ...] = ()  # eos_token_id of generation_config.json, where it has a list
    generation: dict[str, Any] = field(default_factory=dict)
    chat: bool = False  # whether the profile asks through the template


FAMILIES = {
    "llama3": Family(
        "llama",
        {**WIDTH, "tie_word_embeddings": False},
        {
            "<|begin_of_text|>": True, "<|end_of_text|>": True, "<|reserved_special_token_0|>": True,
            "<|finetune_right_pad_id|>": True, "<|start_header_id|>": True, "<|end_header_id|>": True,
            "<|eot_id|>": True,
        },
        roles={"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        template=LLAMA, chat=True, ends=("<|end_of_text|>", "<|eot_id|>"),
        generation={"do_sample": True, "temperature": 0.6, "top_p": 0.9, "min_p": 0.05},
    ),
    "qwen2.5": Family(
        "qwen2",
        {**WIDTH, "tie_word_embeddings": True},
        {
            "<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True, "<|vision_pad|>": True,
            "<|fim_prefix|>": False, "<|fim_pad|>": False,
        },
        roles={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        template=CHATML, rows=40,
        generation={"do_sample": False, "max_new_tokens": 2048},
    ),
    "qwen3": Family(
        "qwen3",
        {**WIDTH, "head_dim": 32, "tie_word_embeddings": True},
        {"<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True, "<think>": False, "</think>": False},
        roles={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        template=CHATML, chat=True, rows=40, ends=("<|im_end|>", "<|endoftext|>"),
        generation={"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95},
    ),
    "gemma3": Family(
        "gemma3_text",
        {**WIDTH, "head_dim": 32, "sliding_window": 32, "query_pre_attn_scalar": 32, "num_hidden_layers": 6},
        {"<start_of_turn>": True, "<end_of_turn>": True, "<unused0>": False, "<unused1>": False},
        first=("<pad>", "<eos>", "<bos>", "<unk>"),
        roles={"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
        template=GEMMA, ends=("<eos>", "<end_of_turn>"),
        generation={"do_sample": True, "top_k": 64, "top_p": 0.95, "cache_implementation": "hybrid"},
    ),
    "gpt2": Family(
        "gpt2",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.1},
        {"<|endoftext|>": True},
        roles={"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
        generation={"_from_model_config": True},
    ),
    "pythia": Family(
        "gpt_neox",
        {
            **{key: value for key, value in WIDTH.items() if key != "num_key_value_heads"},
            "use_parallel_residual": True, "rotary_pct": 0.25, "tie_word_embeddings": False,
        },
        {"        ": False, "    ": False},
        first=("<|endoftext|>", "<|padding|>"),
        roles={"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
        rows=27,
    ),
    "mistral": Family(
        "mistral",
        {**WIDTH, "sliding_window": 32, "tie_word_embeddings": False},
        {},
        first=("<unk>", "<s>", "</s>"),
        roles={"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    ),
    "phi3": Family(
        "phi3",
        {**WIDTH, "sliding_window": 48, "tie_word_embeddings": False},
        {
            "<|endoftext|>": True, "<|assistant|>": True, "<|placeholder1|>": True, "<|system|>": True, "<|end|>": True,
            "<|user|>": True,
        },
        first=("<unk>", "<s>", "</s>"),
        roles={"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"},
        template=PHI, chat=True, rows=53, ends=("<|endoftext|>", "<|assistant|>", "<|end|>"),
    ),
}  # fmt: skip

# The models of profiles/smollm2-135m.yaml and profiles/qwen2.5-0.5b.yaml. SmolLM2's pad token is its end token.
SMOLLM2 = Family(
    "llama",
    {**WIDTH, "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96, "tie_word_embeddings": True},
    {},
    first=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<empty_output>"),
    roles={
        "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>", "pad_token": "<|im_end|>",
    },
    template=CHATML, chat=True,
)  # fmt: skip
QWEN_INSTRUCT = replace(
    FAMILIES["qwen2.5"],
    roles={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    ends=("<|im_end|>", "<|endoftext|>"),
    generation={"do_sample": True, "repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
    chat=True,
)


def make_family(name: str, folder: Path, texts: Sequence[str]) -> Family:
    """Write the files of a small random model of this family into `folder`; returns what it is made of."""
    family = FAMILIES[name]
    make_model(family, folder, texts)
    return family


def make_model(family: Family, folder: Path, texts: Sequence[str]) -> None:
    """Write config, generation config, tokenizer and safetensors of a small random model into `folder`."""
    folder.mkdir(exist_ok=True)
    spaced = "<unk>" in family.first
    tokenizer = (spaced_tokenizer if spaced else byte_tokenizer)(texts, family.first)
    for text, special in family.added.items():
        tokenizer.add_tokens([AddedToken(text, normalized=False, special=special)])
    tokenizer.save(str(folder / "tokenizer.json"))
    # PreTrainedTokenizerFast reads tokenizer.json as it is; other classes of transformers build parts of it anew.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **family.roles}
    if family.template:
        settings["chat_template"] = family.template
    write(folder / "tokenizer_config.json", settings)

    ids = {
        f"{role.removesuffix('_token')}_token_id": tokenizer.token_to_id(text)
        for role, text in family.roles.items()
    }
    ids = {key: value for key, value in ids.items() if key in ("bos_token_id", "eos_token_id")}
    ids.setdefault("bos_token_id", ids["eos_token_id"])
    size = tokenizer.get_vocab_size() + family.rows
    config = AutoConfig.for_model(
        family.model_type, **{**family.settings, **ids, "vocab_size": size, "pad_token_id": None}
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    declared = [tokenizer.token_to_id(text) for text in family.ends]
    write(
        folder / "generation_config.json",
        {**ids, **family.generation, **({"eos_token_id": declared} if declared else {})},
    )


def byte_tokenizer(texts: Sequence[str], first: Sequence[str] = ()) -> Tokenizer:
    """Byte-level BPE, as of GPT-2, NeoX, Llama 3 and Qwen; `first` are its first tokens and special."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=list(first), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def spaced_tokenizer(texts: Sequence[str], first: Sequence[str]) -> Tokenizer:
    """BPE on `▁` words with bytes for what is unknown, as sentencepiece makes it for Llama 2, Mistral and Gemma."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "removed"),
            pre_tokenizers.Digits(True),
            pre_tokenizers.Metaspace(prepend_scheme="never"),
        ]
    )
    special = [*first, *(f"<0x{byte:02X}>" for byte in range(256))]
    trained.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    made = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in made["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=made["vocab"], merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in first])
    return tokenizer


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def commands(export: Path) -> dict[str, list[str]]:
    """The commands that a family is taken through, in order, by the stage's name; the last writes to `export`."""
    alone = {name: [name] for name in ("prepare", "check", "base", "sft", "rollout")}
    exporting = ["export", str(export), "--policy", "sft", "--questions", "5"]
    return {**alone, "evaluate": ["evaluate", "sft"], "export": exporting}


def make_place(name: str, root: Path) -> None:
    """A folder in which `python -m stages` runs on a model of this family, with the tests' own small profile."""
    repository = Path(__file__).resolve().parents[1]
    shutil.copytree(repository / "tests/small", root, dirs_exist_ok=True)
    (root / "stages").symlink_to(repository / "stages")
    (root / "scorer.py").write_text("def score_group(question, trajectories): ...\n", encoding="utf-8")
    path, yaml = root / "profiles/small.yaml", YAML()
    values = yaml.load(path.read_text(encoding="utf-8"))
    values["model"] = {"source": "directory", "dtype": "float32"}
    values["prompt"]["chat"] = FAMILIES[name].chat
    values["hardware"] |= dict.fromkeys(
        ("generation_batch", "per_device_batch", "gradient_checkpointing"), "auto"
    )
    yaml.dump(values, path)
    make_family(
        name, root / "mine", [*values["prompt"]["styles"].values(), *(row["question"] for row in problems())]
    )


def differing(base: Path) -> int:
    """Of five greedy completions, 60 to 90 tokens long with their prompts, how many differ from `model.generate`'s."""
    model, tokenizer = load_policy(None, base)
    ends = end_ids(tokenizer, model.generation_config)
    random = torch.Generator().manual_seed(0)
    sizes = (5, 20, 50, 51, 50)
    prompts = [tuple(torch.randint(10, 300, (size,), generator=random).tolist()) for size in sizes]
    requests = [Request(str(place), prompt, 40) for place, prompt in enumerate(prompts)]
    engine = TransformersEngine(model, ends, tokenizer.pad_token_id, 3)
    found = {one.id: one.tokens for one in engine.generate(requests)}
    wrong = 0
    for request in requests:
        ids = torch.tensor([request.prompt])
        plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        wanted = [token for token in plain[0, ids.shape[1] :].tolist() if token not in ends]
        wrong += list(found[request.id]) != wanted
    return wrong
