"""The profiles for real models run from end to end on small random models of the same architecture.

The model lies in the hub's cache like a download of the pinned revision, in the same files as the real one: Abel's fp32
pickle shards and Llama-2 style tokenizer, R1's safetensors, byte-level tokenizer and chat template, SmolLM2's and
Qwen2.5's special tokens. Prompts, arms, precision and adapter are the profile's own. Only sizes and data differ.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ruamel.yaml import YAML
from safetensors import safe_open
from transformers import AutoTokenizer

from stages.run.files import read_json, read_jsonl, write_jsonl
from stages.text.answers import read_answer
from tests.families import QWEN_INSTRUCT, SMOLLM2, Family, make_model
from tests.model_files import R1_TEMPLATE, abel_files, corpus, problems, r1_files

if TYPE_CHECKING:
    from tests.pipeline.conftest import Project

pytestmark = pytest.mark.pipeline

STAGE_RUNS = [
    *("prepare", "base", "sft", "headline", "report"),
    *(f"{stage}@dpo" for stage in ("rollout", "coherence", "preference", "dpo")),
    *(f"{stage}@{policy}" for stage in ("evaluate", "vote") for policy in ("base", "sft", "dpo")),
]
LIMIT = 80  # tokens; a solution of R1's takes about 50
# Less of everything. A random model learns from few short texts only at a high rate.
SMALL: dict[str, Any] = {
    "data": {"source": "files", "changed": "one", "valid": 8},
    "sft.epochs": 4,
    "sft.batch": 8,
    "sft.learning_rate": 0.01,
    "sft.checkpoint_steps": 30,
    "sft.select": {"steps": 30, "questions": 8, "samples": 1, "max_new_tokens": LIMIT, "level": 1.0},
    "rollout.questions": 16,
    "rollout.max_new_tokens": LIMIT,
    "dpo.batch": 8,
    "dpo.learning_rate": 0.0005,
    "dpo.checkpoint_steps": 4,
    "dpo.select": {"steps": 4, "questions": 8, "samples": 1, "max_new_tokens": LIMIT, "level": 1.0},
    "evaluate.max_new_tokens": LIMIT,
    "evaluate.samples": 2,
    "hardware.threads": 1,
    "hardware.generation_batch": 256,
}


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
    """A clone of the project as it was before its first run."""
    copy = replace(project, root=folder / "project", guard=folder / "guard")
    shutil.copytree(project.guard, copy.guard)
    (copy.guard / "attempts").unlink(missing_ok=True)
    project.run("git", "clone", "--quiet", str(project.root), str(copy.root))
    first = copy.run("git", "rev-list", "--max-parents=0", "HEAD").stdout.strip()
    copy.run("git", "checkout", "--quiet", first)
    return copy


def run_profile(
    project: Project, profile: str, build: Callable[[Path, dict[str, str]], None]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Put the model where a download would be and run the whole pipeline; returns environment and profile."""
    files = project.root.parent / "files"
    files.mkdir()
    path = project.root / f"profiles/{profile}.yaml"
    values = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    build(files, values["prompt"]["styles"])
    into_hub_cache(files, project.root.parent / "cache", values["model"]["id"], values["model"]["revision"])
    rows = problems()
    write_jsonl(project.root / "train.jsonl", rows[:120])
    write_jsonl(project.root / "platinum.jsonl", rows[120:])
    own = {"own.train": "train.jsonl", "own.platinum": "platinum.jsonl"}
    project.update("params.yaml", {"profile": profile, **own})
    project.update(f"profiles/{profile}.yaml", SMALL)
    offline = {"HF_HOME": str(project.root.parent / "cache"), "HF_HUB_OFFLINE": "1"}
    project.run("dvc", "repro", "base", **offline)  # the only stage that looks into the hub's cache
    print(project.run("dvc", "repro").stderr)
    return offline, YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))


def read(project: Project, name: str) -> Any:
    return read_json(project.root / name)


def read_rows(project: Project, name: str) -> list[dict[str, Any]]:
    return list(read_jsonl(project.root / name))


def read_curve(project: Project, name: str) -> list[dict[str, float]]:
    head, *lines = (project.root / f"metrics/curves/{name}.csv").read_text(encoding="utf-8").splitlines()
    return [dict(zip(head.split(","), map(float, line.split(",")), strict=True)) for line in lines]


def assert_converted(project: Project) -> Any:
    """`checkpoints/base` holds only bf16 safetensors, and a tokenizer whose pad token is not its end token."""
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


def assert_ran(project: Project, profile: dict[str, Any]) -> None:
    """Every stage wrote its outputs, both adapters were trained, and nothing is out of date."""
    assert sorted(YAML(typ="safe").load(project.root / "dvc.lock")["stages"]) == sorted(STAGE_RUNS)
    assert project.status() == {}
    assert not (project.guard / "attempts").exists(), "a stage tried to open a network connection"

    # Training: both adapters as the profile says, gradients at every step, loss falling from its start.
    for name in ("sft_lora", "dpo_coherence_lora/dpo"):
        config = read(project, f"checkpoints/{name}/adapter_config.json")
        lora = profile["sft"]["lora"]
        assert [config[key] for key in ("r", "lora_alpha", "lora_dropout")] == list(lora.values())
        linear = {name.rpartition(".")[2] for name in config["target_modules"]}
        assert len(linear) == 7, "four of attention and three of the MLP"
        files = {file.name for file in (project.root / "checkpoints" / name).iterdir()}
        assert files == {"adapter_config.json", "adapter_model.safetensors", "manifest.json"}
    learned, dpo = read_curve(project, "sft"), read_curve(project, "dpo")
    assert all(row["grad_norm"] > 0 for row in learned[1:])
    assert learned[-1]["loss"] < 0.7 * learned[0]["loss"]
    if profile["dpo"]["loss_type"] == ["sigmoid"]:  # else the likelihood of the chosen answers is in it, too
        assert dpo[0]["loss"] == pytest.approx(0.6931, abs=1e-3), "policy and reference are the same at first"
    assert all(row["grad_norm"] > 0 for row in dpo)
    assert read_curve(project, "dpo_selection")[0]["step"] == 0

    # Rollouts through all arms of the profile, with both verdicts; pairs from them.
    rollouts = read_rows(project, "data/regime_w_rollouts/dpo.jsonl")
    assert len(rollouts) == SMALL["rollout.questions"]
    arms = list(profile["rollout"]["arms"])
    assert len(arms) == 8
    for row in rollouts:
        assert [one["arm"] for one in row["trajectories"]] == arms
        assert all(one["logprob"] < 0 and one["tokens"] <= LIMIT for one in row["trajectories"])
    verdicts = {one["correct"] for row in rollouts for one in row["trajectories"]}
    assert verdicts == {True, False}
    assert any(one["s_path"] > 0 for row in rollouts for one in row["trajectories"]), "no equation was read"
    pairs = read_rows(project, "data/coherence_preferences/dpo.jsonl")
    assert {"correctness"} <= {pair["kind"] for pair in pairs}
    assert len(dpo) == -(-len(pairs) // SMALL["dpo.batch"]), "no pair was too long"

    # Evaluation: every held-out question, by every policy; SFT writes the format, the base does not.
    for policy in ("base", "sft", "dpo"):
        rows = read_rows(project, f"data/platinum_eval/{policy}.jsonl")
        assert len(rows) == len(problems()) - 120
        for row in rows:
            assert row["answer"] == read_answer(row["completion"], row["question"]).answer
            assert len(row["samples"]) == 2
    base, sft = (read(project, f"metrics/platinum/{policy}.json") for policy in ("base", "sft"))
    assert sft["accuracy"] > base["accuracy"]


def test_abel_runs_whole(small_project: Project, tmp_path: Path) -> None:
    """`abel-7b` on a small Mistral with Abel's files: pickle shards, sliding window, and pad equal to end."""
    project = fresh_copy(small_project, tmp_path)
    _, profile = run_profile(project, "abel-7b", abel_files)
    tokenizer = assert_converted(project)
    assert tokenizer.convert_tokens_to_ids("<extra_31>") == len(tokenizer) - 1
    config = read(project, "checkpoints/base/config.json")
    assert config["sliding_window"] is None
    assert config["vocab_size"] > len(tokenizer)
    assert_ran(project, profile)


def test_r1_runs_whole(small_project: Project, tmp_path: Path) -> None:
    """`r1-distill-8b` on a small Llama with R1's tokens and chat template: it thinks, then answers."""
    project = fresh_copy(small_project, tmp_path)
    offline, profile = run_profile(project, "r1-distill-8b", r1_files)
    tokenizer = assert_converted(project)
    assert tokenizer.chat_template == R1_TEMPLATE
    assert_ran(project, profile)
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("profile", "family", "pad"),
    [("smollm2-135m", SMOLLM2, "<|endoftext|>"), ("qwen2.5-0.5b", QWEN_INSTRUCT, "<|endoftext|>")],
    ids=["smollm2-135m", "qwen2.5-0.5b"],
)
def test_a_small_model_runs_whole(
    small_project: Project, tmp_path: Path, profile: str, family: Family, pad: str
) -> None:
    """`smollm2-135m` and `qwen2.5-0.5b`, with their tokens and chat template, and the profile's own system line."""
    # Not the warm parent's network, where even the loopback interface is down: SmolLM2's two processes talk by it.
    project = fresh_copy(small_project, tmp_path).cold

    def files(folder: Path, styles: dict[str, str]) -> None:
        make_model(family, folder, corpus(styles))

    offline, values = run_profile(project, profile, files)
    assert assert_converted(project).pad_token == pad
    assert_ran(project, values)
    shown = project.stages("check", **offline).stdout
    assert f"<|im_start|>system\n{values['prompt']['system']}<|im_end|>\n<|im_start|>user" in shown
