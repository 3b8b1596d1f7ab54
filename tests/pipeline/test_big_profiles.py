"""The two profiles that cannot be downloaded here run whole on a small random model of the same architecture.

The model lies in the hub's cache where a download of the pinned revision would be, in the files the real one
has: Abel's fp32 pickle shards and Llama-2 style tokenizer; R1's safetensors, byte-level tokenizer and chat
template. The profile's own prompts, arms, precision and adapter are used; only sizes and data differ.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from ruamel.yaml import YAML
from safetensors import safe_open
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
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from stages.core.answers import read_answer

if TYPE_CHECKING:
    from tests.pipeline.conftest import Project

pytestmark = pytest.mark.pipeline

NEVER_COPIED = (
    "/.git",
    "/.dvc/cache",
    "/.dvc/tmp",
    "/.work",
    "/data",
    "/checkpoints",
    "/metrics",
    "/dvc.lock",
)
STAGE_RUNS = ["prepare", "base", "sft", "rollout", "coherence", "preference", "dpo", "headline", "report"] + [
    f"evaluate@{policy}" for policy in ("base", "sft", "dpo")
]
LIMIT = 80  # tokens; a solution of R1's takes about 50
# Less of everything. A random model learns from few short texts only at a high rate.
SMALL: dict[str, Any] = {
    "data": {"source": "files", "train": "train.jsonl", "platinum": "platinum.jsonl", "valid": 8},
    "sft.epochs": 4,
    "sft.batch": 8,
    "sft.learning_rate": 0.01,
    "sft.checkpoint_steps": 30,
    "rollout.questions": 16,
    "rollout.max_new_tokens": LIMIT,
    "dpo.batch": 8,
    "dpo.learning_rate": 0.0005,
    "dpo.checkpoint_steps": 4,
    "dpo.select_steps": 4,
    "dpo.select_questions": 8,
    "dpo.select_max_new_tokens": LIMIT,
    "evaluate.max_new_tokens": LIMIT,
    "evaluate.samples": 2,
    "hardware.threads": 1,
    "hardware.generation_batch": 256,
}


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


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def corpus(styles: dict[str, str]) -> list[str]:
    """Words the tokenizer is made from: the prompts and the problems."""
    return [*styles.values(), *(f"{row['question']} {row['answer']}" for row in problems())]


# ---- Abel ---------------------------------------------------------------------------------------------


def abel_files(folder: Path, styles: dict[str, str]) -> None:
    """Abel-7B-002 as on the hub: three fp32 pickle shards with an index, and a Llama-2 style tokenizer."""
    tokenizer = llama2_tokenizer(corpus(styles))
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {f"<extra_{n}>": tokenizer.get_vocab_size() - 32 + n for n in range(32)}
    write(folder / "added_tokens.json", added)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write(folder / "special_tokens_map.json", special)
    # Its pad token is its end token: padding would be learned as an end, or the end not at all.
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
    """DeepSeek-R1-Distill-Llama-8B as on the hub: two bf16 safetensors shards, its tokenizer and template."""
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


def into_hub_cache(files: Path, cache: Path, identity: str, revision: str) -> None:
    """Place the files as huggingface_hub does: blobs by hash, links to them in the revision's snapshot."""
    repository = cache / "hub" / f"models--{identity.replace('/', '--')}"
    snapshot = repository / "snapshots" / revision
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision, encoding="utf-8")
    for file in files.iterdir():
        blob = hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(repository / "blobs" / blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob)


def fresh_copy(project: Project, folder: Path) -> Project:
    """The project's files without any run's outputs, in a git repository of their own."""
    root = folder / "project"

    def outputs(place: str, names: list[str]) -> list[str]:
        inside = "/" + Path(place).relative_to(project.root).as_posix() if Path(place) != project.root else ""
        return [name for name in names if f"{inside}/{name}" in NEVER_COPIED]

    shutil.copytree(project.root, root, ignore=outputs, symlinks=True)
    shutil.copytree(project.guard, folder / "guard")
    (folder / "guard" / "attempts").unlink(missing_ok=True)
    copy = replace(project, root=root, guard=folder / "guard")
    copy.run("git", "init", "--quiet")
    return copy


def run_profile(
    project: Project, profile: str, build: Callable[[Path, dict[str, str]], None]
) -> dict[str, str]:
    """Put the model where the hub's copy would be and run the whole pipeline; returns the environment."""
    files = project.root.parent / "files"
    files.mkdir()
    values = YAML(typ="safe", pure=True).load(
        (project.root / f"profiles/{profile}.yaml").read_text(encoding="utf-8")
    )
    build(files, values["prompt"]["styles"])
    into_hub_cache(files, project.root.parent / "cache", values["model"]["id"], values["model"]["revision"])
    rows = problems()
    write_jsonl(project.root / "train.jsonl", rows[:120])
    write_jsonl(project.root / "platinum.jsonl", rows[120:])
    project.update("params.yaml", {"profile": profile})
    project.update(f"profiles/{profile}.yaml", SMALL)
    offline = {"HF_HOME": str(project.root.parent / "cache"), "HF_HUB_OFFLINE": "1"}
    print(project.run("dvc", "repro", **offline).stderr)
    return offline


def read(project: Project, name: str) -> Any:
    return json.loads((project.root / name).read_text(encoding="utf-8"))


def read_rows(project: Project, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (project.root / name).read_text(encoding="utf-8").splitlines()]


def read_curve(project: Project, name: str) -> list[dict[str, float]]:
    head, *lines = (project.root / f"metrics/curves/{name}.csv").read_text(encoding="utf-8").splitlines()
    return [dict(zip(head.split(","), map(float, line.split(",")), strict=True)) for line in lines]


def assert_converted(project: Project) -> Any:
    """`checkpoints/base` holds bf16 safetensors alone, and a tokenizer that can tell padding from an end."""
    base = project.root / "checkpoints/base"
    assert not [file.name for file in base.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".py")]
    weights = sorted(base.glob("*.safetensors"))
    assert weights
    for file in weights:
        with safe_open(file, "pt") as tensors:
            assert {str(tensors.get_tensor(name).dtype) for name in tensors.keys()} == {"torch.bfloat16"}  # noqa: SIM118
    generation = read(project, "checkpoints/base/generation_config.json")
    assert not generation.get("do_sample")
    assert "temperature" not in generation
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    assert tokenizer.pad_token_id is not None
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert read(project, "checkpoints/base/config.json")["pad_token_id"] == tokenizer.pad_token_id
    text = "Ann has 1+3=<<1+3=4>>4.\n#### 4"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    return tokenizer


def assert_ran(project: Project, offline: dict[str, str], profile: dict[str, Any]) -> None:
    """Every stage wrote what it should, the adapters were really trained, and nothing is out of date."""
    assert sorted(YAML(typ="safe").load(project.root / "dvc.lock")["stages"]) == sorted(STAGE_RUNS)
    assert project.status(**offline) == {}
    assert not (project.guard / "attempts").exists(), "a stage tried to open a network connection"

    # Training: both adapters as the profile says, gradients at every step, loss falling from its start.
    for name in ("sft_lora", "dpo_coherence_lora"):
        config = read(project, f"checkpoints/{name}/adapter_config.json")
        lora = profile["sft"]["lora"]
        assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (
            lora["r"],
            lora["alpha"],
            lora["dropout"],
        )
        linear = {name.rpartition(".")[2] for name in config["target_modules"]}
        assert len(linear) == 7, "attention's four and the MLP's three linear layers"
        files = {file.name for file in (project.root / "checkpoints" / name).iterdir()}
        assert files == {"adapter_config.json", "adapter_model.safetensors", "manifest.json"}
    sft, dpo = read_curve(project, "sft"), read_curve(project, "dpo")
    assert all(row["grad_norm"] > 0 for row in sft[1:])
    assert sft[-1]["loss"] < 0.7 * sft[0]["loss"]
    assert dpo[0]["loss"] == pytest.approx(0.6931, abs=1e-3), "policy and reference start as one"
    assert all(row["grad_norm"] > 0 for row in dpo)
    assert read_curve(project, "dpo_selection")[0]["step"] == 0

    # Rollouts through all arms of the profile, with both verdicts; pairs from them.
    rollouts = read_rows(project, "data/regime_w_rollouts.jsonl")
    assert len(rollouts) == SMALL["rollout.questions"]
    arms = list(profile["rollout"]["arms"])
    assert len(arms) == 8
    for row in rollouts:
        assert [one["arm"] for one in row["trajectories"]] == arms
        assert all(one["logprob"] < 0 and one["tokens"] <= LIMIT for one in row["trajectories"])
    verdicts = {one["correct"] for row in rollouts for one in row["trajectories"]}
    assert verdicts == {True, False}
    assert any(one["s_path"] > 0 for row in rollouts for one in row["trajectories"]), "no equation was read"
    pairs = read_rows(project, "data/coherence_preferences.jsonl")
    assert {"correctness"} <= {pair["kind"] for pair in pairs}
    assert len(dpo) == -(-len(pairs) // SMALL["dpo.batch"]), "no pair was too long"

    # Evaluation: every held-out question, by every policy; SFT writes the format, the base does not.
    for policy in ("base", "sft", "dpo"):
        rows = read_rows(project, f"data/platinum_eval/{policy}.jsonl")
        assert len(rows) == len(problems()) - 120
        for row in rows:
            assert row["answer"] == read_answer(row["completion"], row["question"]).answer
            assert len(row["samples"]) == 2
        metrics = read(project, f"metrics/platinum/{policy}.json")
        assert metrics["accuracy"] == sum(row["correct"] for row in rows) / len(rows)
    assert (
        read(project, "metrics/platinum/sft.json")["accuracy"]
        > read(project, "metrics/platinum/base.json")["accuracy"]
    )
    assert read(project, "metrics/headline.json")
    assert read(project, "metrics/comparison.json")
    assert "<html" in (project.root / "report.html").read_text(encoding="utf-8")


def load_profile(project: Project, name: str) -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load(
        (project.root / f"profiles/{name}.yaml").read_text(encoding="utf-8")
    )


def test_abel_runs_whole(small_project: Project, tmp_path: Path) -> None:
    """`abel-7b` on a small Mistral in Abel's layout: pickle shards only, sliding window, pad equal to end."""
    project = fresh_copy(small_project, tmp_path)
    offline = run_profile(project, "abel-7b", abel_files)
    tokenizer = assert_converted(project)
    assert tokenizer.convert_tokens_to_ids("<extra_31>") == len(tokenizer) - 1
    config = read(project, "checkpoints/base/config.json")
    assert config["sliding_window"] is None
    assert config["vocab_size"] > len(tokenizer)
    assert_ran(project, offline, load_profile(project, "abel-7b"))


def test_r1_runs_whole(small_project: Project, tmp_path: Path) -> None:
    """`r1-distill-8b` on a small Llama with R1's tokens and chat template: it thinks, then answers."""
    project = fresh_copy(small_project, tmp_path)
    offline = run_profile(project, "r1-distill-8b", r1_files)
    tokenizer = assert_converted(project)
    assert tokenizer.chat_template == R1_TEMPLATE
    profile = load_profile(project, "r1-distill-8b")
    assert_ran(project, offline, profile)
    # The template opened the thought; the completion must end it, and the answer is what stands after it.
    answered = [
        row for row in read_rows(project, "data/platinum_eval/sft.jsonl") if row["answer"] is not None
    ]
    assert answered
    for row in answered:
        assert row["completion"].startswith("<think>\n")
        assert "</think>" in row["completion"]
        spoken = row["completion"].rpartition("</think>")[2].partition("<think>")[0]
        assert row["answer"] == read_answer(spoken).answer
    shown = project.stages("check", **offline).stdout
    assert "<｜User｜>" in shown
    assert "<｜Assistant｜><think>" in shown


class Trap:
    """What a malicious checkpoint holds: unpickling it runs code, here code that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


def test_code_in_a_pickle_is_refused(small_project: Project, tmp_path: Path) -> None:
    """One clear line, no traceback, no checkpoint, and the code in the file never runs."""
    project = fresh_copy(small_project, tmp_path)
    folder, trap = tmp_path / "model", tmp_path / "executed"
    folder.mkdir()
    styles = load_profile(project, "abel-7b")["prompt"]["styles"]
    abel_files(folder, styles)
    shard = folder / "pytorch_model-00002-of-00003.bin"
    torch.save({**torch.load(shard), "trap": Trap(trap)}, shard)
    project.update("params.yaml", {"profile": "abel-7b"})
    project.update(
        "profiles/abel-7b.yaml", {"model": {"source": "directory", "path": str(folder), "dtype": "bfloat16"}}
    )
    done = project.stages("base", check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"error: {folder}: a pickle of weights holds code (")
    assert "exec" in line
    assert not trap.exists()
    assert not (project.root / "checkpoints/base").exists()
    torch.load(shard, weights_only=False)  # the trap is real: a loader that trusts the file springs it
    assert trap.exists()


def test_incomplete_weights_are_refused(small_project: Project, tmp_path: Path) -> None:
    """A checkpoint that lacks tensors is not filled up with random ones."""
    project = fresh_copy(small_project, tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    r1_files(folder, load_profile(project, "r1-distill-8b")["prompt"]["styles"])
    index = folder / "model.safetensors.index.json"
    weights = json.loads(index.read_text(encoding="utf-8"))
    lacking = folder / weights["weight_map"].pop("model.layers.1.mlp.up_proj.weight")
    with safe_open(lacking, "pt") as tensors:
        kept = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    del kept["model.layers.1.mlp.up_proj.weight"]
    save_file(kept, lacking, metadata={"format": "pt"})
    write(index, weights)
    project.update("params.yaml", {"profile": "r1-distill-8b"})
    source = {"source": "directory", "path": str(folder), "dtype": "bfloat16"}
    project.update("profiles/r1-distill-8b.yaml", {"model": source})
    done = project.stages("base", check=False)
    assert done.returncode == 1
    assert "lack 1 of the model's tensors (model.layers.1.mlp.up_proj.weight" in done.stderr
    assert not (project.root / "checkpoints/base").exists()
