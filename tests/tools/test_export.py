"""export: a folder that answers as the policy does, a card that says what was measured, and nothing half made.

The models are random and small; tests/pipeline/test_export.py exports a trained one and loads it elsewhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from tokenizers import processors
from transformers import MistralConfig, MistralForCausalLM

from stages.core.answers import read_answer
from stages.core.errors import UserError
from stages.core.params import BuiltModel, load_params
from stages.core.paths import ADAPTERS
from stages.core.policy import adapter_config, adapter_weights, load_policy, save_adapter
from stages.core.prompts import prompt_ids
from stages.core.records import read_jsonl, write_json, write_jsonl
from stages.core.stage import write_manifest
from stages.core.stats import summarise
from stages.engine.base import Request
from stages.engine.choose import make_engine
from stages.tiny.model import build_tokenizer
from stages.tools import export

REPO = Path(__file__).resolve().parents[2]
SMALL = REPO / "tests" / "small"
BASE = Path("checkpoints/base")
LIMIT = 64  # evaluate.max_new_tokens
QUESTIONS = [export.EXAMPLE, *(f"Ben has {n} pens and gets {n + 1}. How many?" for n in range(7))]
CHAT = (
    "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}model: <think>\n{% endif %}"
)
CHAT_PROMPT = {
    "chat": True, "system": "It's `brief` \"here\".", "opening": "<think>\n", "default": "plain",
    "styles": {"plain": "{question}\nEnd it with '#### '.", "direct": "{question}"},
    "completion": "<think>\n{solution}",
}  # fmt: skip


def make(
    root: Path, prompt: dict[str, Any] | None = None, begins: bool = False, policies: Iterable[str] = ADAPTERS
) -> None:
    """A run by hand in `root`: random base and adapters, evaluated, with the manifests a run writes."""
    from ruamel.yaml import YAML

    (root / "profiles").mkdir(parents=True)
    (root / "params.yaml").write_text((SMALL / "params.yaml").read_text())
    profile = YAML(typ="safe").load((SMALL / "profiles" / "small.yaml").read_text())
    profile["prompt"] = prompt or profile["prompt"]
    (root / "profiles" / "small.yaml").write_text(json.dumps(profile))
    with contextlib.chdir(root):
        _make_checkpoints(bool(prompt), begins)
        _make_evaluations(policies)


def _make_checkpoints(chat: bool, begins: bool) -> None:
    params = load_params()
    assert isinstance(params.model, BuiltModel)
    tokenizer = build_tokenizer(params.model, [(QUESTIONS[0], "3*4=12\n#### 12")])
    if chat:
        tokenizer.chat_template = CHAT
    if begins:
        one = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = one
    torch.manual_seed(4)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=len(tokenizer) + 9, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.25, sliding_window=None,
        )
    )  # fmt: skip
    declared = model.generation_config
    declared.eos_token_id, declared.pad_token_id = [2, *range(40, 44)], 0
    declared.repetition_penalty, declared.do_sample, declared.temperature, declared.top_k = 1.9, True, 0.5, 3
    model.save_pretrained(BASE)
    tokenizer.save_pretrained(BASE)
    for name, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
        values = json.loads((BASE / name).read_text())
        (BASE / name).write_text(json.dumps({**values, key: "/home/someone/model"}))
    sections = params.model_dump(mode="json")
    hub = {"source": "hub", "id": "some_one/A|b*<i>", "revision": "c0ffee"}
    write_manifest({"stage": "base", "params": {"model": hub}, "inputs": {}}, [BASE])
    platinum = Path("data/gsm8k/platinum.jsonl")
    platinum.parent.mkdir(parents=True)
    write_jsonl(
        platinum, [{"id": f"p{n}", "question": text, "gold": "1"} for n, text in enumerate(QUESTIONS)]
    )
    data = {
        "source": "files",
        "train": "/home/someone/train.jsonl",
        "platinum": "/home/someone/p.jsonl",
        "valid": 3,
    }
    write_manifest({"stage": "prepare", "params": {"data": data}, "inputs": {}}, [platinum.parent])
    tuned = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for number, (stage, folder) in enumerate((name, path) for name, path in ADAPTERS.items() if path):
        torch.manual_seed(number)
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
        folder.mkdir()
        save_adapter(adapter_weights(tuned), adapter_config(tuned), folder)
        used = {name: sections[name] for name in (stage, "prompt", "seed")}
        write_manifest(
            {"stage": stage, "params": used, "inputs": {"checkpoints/base": sum_of(BASE)}}, [folder]
        )


def sum_of(path: Path) -> str:
    return hashlib.sha256((path / "manifest.json" if path.is_dir() else path).read_bytes()).hexdigest()


def _make_evaluations(policies: Iterable[str]) -> None:
    """Greedy answers as the evaluation makes them; the verdicts are made up, so that there are some of both."""
    params = load_params()
    for policy in policies:
        place, adapter = list(ADAPTERS).index(policy), ADAPTERS[policy]
        model, tokenizer = load_policy(adapter)
        asked = [
            Request(str(n), tuple(prompt_ids(tokenizer, params.prompt, q)), LIMIT)
            for n, q in enumerate(QUESTIONS)
        ]
        found = {one.id: one for one in make_engine(model, tokenizer, params.hardware).generate(asked)}
        rows = []
        for number, question in enumerate(QUESTIONS):
            one = found[str(number)]
            text = params.prompt.opening + tokenizer.decode(one.tokens, skip_special_tokens=True)
            answer, correct = read_answer(text, question).answer, number <= 2 * place
            graded = {
                "completion": text,
                "answer": answer,
                "correct": correct,
                "tokens": len(one.tokens),
                "finish": one.finish,
            }
            more = {"leak": False, "answers_found": 1, "flexible_answer": answer, "flexible_correct": correct}
            rows.append(
                {
                    "id": f"p{number}",
                    "question": question,
                    "gold": "1",
                    **graded,
                    **more,
                    "samples": [graded] * 2,
                }
            )
        paths = [Path(f"data/platinum_eval/{policy}.jsonl"), Path(f"metrics/platinum_details/{policy}.json")]
        write_jsonl(paths[0], rows)
        write_json(paths[1], summarise(rows, 0))
        inputs = {
            path.as_posix(): sum_of(path)
            for path in (Path("data/gsm8k/platinum.jsonl"), BASE, adapter)
            if path
        }
        used = {name: params.model_dump(mode="json")[name] for name in ("evaluate", "prompt", "seed")}
        write_manifest({"stage": f"evaluate@{policy}", "params": used, "inputs": inputs}, paths)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("export") / "project"
    make(root)
    return root


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, that may be changed; the current folder."""
    shutil.copytree(made, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def exported(folder: Path, **options: Any) -> tuple[dict[str, Any], str]:
    """The facts, and what was printed."""
    stream = io.StringIO()
    export.main(folder, console=Console(file=stream, width=80, highlight=False), **options)
    return json.loads((folder / export.FACTS).read_text()), stream.getvalue()


def code_of(folder: Path) -> str:
    return re.findall(
        r"^```+python\n(.*?)^```+$", (folder / export.CARD).read_text(), re.MULTILINE | re.DOTALL
    )[0]


def run_card(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the card's own code prints."""
    capsys.readouterr()
    with contextlib.chdir(folder):
        exec(compile(code_of(folder), "README.md", "exec"), {})
    return capsys.readouterr().out.removesuffix("\n")


def evaluated(policy: str) -> list[dict[str, Any]]:
    return list(read_jsonl(Path(f"data/platinum_eval/{policy}.jsonl")))


@pytest.mark.parametrize("policy", ["base", "sft", "dpo"])
def test_the_card_s_code_gives_the_evaluation_s_answer(
    project: Path, capsys: pytest.CaptureFixture[str], policy: str
) -> None:
    """All of the declared end tokens end it; the base's penalties and sampling do not count."""
    facts, words = exported(project.parent / policy, policy=policy)
    assert run_card(project.parent / policy, capsys) == evaluated(policy)[0]["completion"]
    found = facts["unmerged"]
    assert (found["questions"], found["changed_answers"], found["changed_texts"]) == (8, 0, 0)
    assert found["largest_logit_difference"] < 1e-4
    assert found["logit_positions"] == sum(row["tokens"] + 1 for row in evaluated(policy))
    assert "0 greedy answers changed (0%)" in words


def test_a_tokenizer_that_begins_by_itself_and_one_that_does_not(project: Path, tmp_path: Path) -> None:
    exported(tmp_path / "a", questions=0)
    assert "Sent as text, it needs `<s>` in front" in (tmp_path / "a" / export.CARD).read_text()
    make(tmp_path / "begins", begins=True, policies=[])
    with contextlib.chdir(tmp_path / "begins"):
        exported(tmp_path / "b", questions=0)
    assert "As text it can be sent as it is" in (tmp_path / "b" / export.CARD).read_text()


def test_a_chat_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "chat", CHAT_PROMPT, policies=["dpo"])
    with contextlib.chdir(tmp_path / "chat"):
        exported(tmp_path / "out")
        assert run_card(tmp_path / "out", capsys) == evaluated("dpo")[0]["completion"]
    assert "`<think>`" in (tmp_path / "out" / export.CARD).read_text()


def test_the_result_is_that_of_these_weights(project: Path, tmp_path: Path) -> None:
    facts, words = exported(tmp_path / "a", questions=3)
    assert (facts["result"]["questions"], facts["result"]["accuracy"]) == (8, 5 / 8)
    assert [(one["with"], one["gained"], one["lost"]) for one in facts["comparisons"]] == [
        ("base", 4, 0),
        ("SFT", 2, 0),
    ]
    card = " ".join((tmp_path / "a" / export.CARD).read_text().split())
    assert "8 questions, greedy decoding: **62.5 %** (95 % interval 30.6 % to 86.3 %)" in card
    assert "Against SFT on the same questions: +25.0 points" in card
    assert "62.5 % (30.6–86.3)" in words
    # An evaluation of other weights, changed numbers and none at all are no result.
    details = Path("metrics/platinum_details/dpo.json")
    details.write_text(details.read_text().replace("0.625", "0.925"))
    assert exported(tmp_path / "b", questions=0)[0]["result"] is None
    rows = Path("data/platinum_eval/dpo.manifest.json")
    rows.unlink()
    facts, words = exported(tmp_path / "c", questions=0)
    assert facts["result"] is None and facts["comparisons"] == []
    assert "Platinum: no evaluation of it is here" in words
    assert "No result: no evaluation of it is here." in (tmp_path / "c" / export.CARD).read_text()


def test_changed_weights_are_not_exported_and_changed_parents_are_told(project: Path, tmp_path: Path) -> None:
    Path("data/gsm8k/platinum.jsonl").write_text('{"id": "p0", "question": "Why?", "gold": "1"}\n')
    facts, words = exported(tmp_path / "a", questions=0)
    assert facts["result"] is None
    assert any("data/gsm8k/platinum.jsonl" in link for link in facts["broken"])
    assert "WARNING data/gsm8k/platinum.jsonl" in words
    assert "Take the settings below with care" in (tmp_path / "a" / export.CARD).read_text()
    weights = Path("checkpoints/dpo_coherence_lora/adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors, written by dpo, differs"):
        exported(tmp_path / "b")
    assert exported(tmp_path / "b", policy="sft", questions=0)[0]["policy"] == "sft"
    write_manifest({"stage": "base", "params": {}, "inputs": {}}, [BASE])  # built again, as another one
    with pytest.raises(UserError, match=r"checkpoints/base, read by sft, differs"):
        exported(tmp_path / "c", policy="sft")


def test_nothing_private_is_in_the_folder_and_text_is_escaped(project: Path, tmp_path: Path) -> None:
    exported(tmp_path / "a")
    for path in (tmp_path / "a").iterdir():
        text = path.read_bytes()
        assert b"/home/someone" not in text and str(tmp_path).encode() not in text, path
    card = (tmp_path / "a" / export.CARD).read_text()
    head = card.split("---\n")[1]
    assert 'base_model: "some_one/A|b*<i>"' in head
    assert re.search(r"^# license: ", head, re.MULTILINE)
    assert r"# A\|b\*\<i\>, SFT and DPO" in card
    assert "revision c0ffee" in card
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "a").iterdir()} == {0o666 & ~_umask()}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_markdown_filters() -> None:
    assert export.inline_code("a `b` c") == "``a `b` c``"
    assert export.inline_code("`b`") == "`` `b` ``"
    assert export.fenced("```\nx\n```", "python") == "````python\n```\nx\n```\n````"
    assert export.escape_markdown("a\n<b> & [c](d) _e_") == r"a \<b\> &amp; \[c\](d) \_e\_"


def test_precision_and_shards(project: Path, tmp_path: Path) -> None:
    facts, words = exported(tmp_path / "a", precision="bf16", max_shard_size="20KB", questions=2)
    assert facts["precision"] == "bf16" and len(facts["files"]) > 1
    assert 0 < facts["merge"]["rounding"] < 0.5
    assert "Rounding the sums to bf16 moves the weights by" in words
    model, _ = load_policy(None, tmp_path / "a")
    assert model.dtype == torch.bfloat16
    facts, _ = exported(tmp_path / "b", questions=0)
    assert facts["precision"] == "fp32"  # the base's
    assert "not compared with that policy" in (tmp_path / "b" / export.CARD).read_text()


@pytest.mark.parametrize(
    ("folder", "options", "words"),
    [
        ("../x", {"policy": "rlhf"}, "no policy 'rlhf'; choose one of base, sft, dpo"),
        ("../x", {"precision": "int8"}, "'int8' is unknown; choose one of bf16, fp16, fp32"),
        ("../x", {"max_shard_size": "big"}, "say it as 500MB or 4GB"),
        ("../x", {"max_shard_size": "0GB"}, "say it as 500MB or 4GB"),
        ("checkpoints/base/x", {}, "is checkpoints/base; name a new folder"),
        (".", {"force": True}, "is where this project lies"),
        ("..", {"force": True}, "is where this project lies"),
        ("../full", {"force": True}, "is not empty and no earlier export"),
        ("../file", {}, "exists and is no folder"),
        ("../file/x", {}, "cannot be written"),
        ("../link", {}, "exists and is no folder"),
    ],
)
def test_mistakes_are_told_before_any_work(
    project: Path, folder: str, options: dict[str, Any], words: str
) -> None:
    (project.parent / "full").mkdir()
    (project.parent / "full" / "thesis.txt").write_text("years of work")
    (project.parent / "file").write_text("")
    (project.parent / "link").symlink_to(project.parent / "full")
    before = sorted(project.parent.rglob("*"))
    with pytest.raises(UserError, match=re.escape(words)):
        exported(Path(folder), **options)
    assert sorted(project.parent.rglob("*")) == before


def test_an_earlier_export_is_replaced_only_by_force_and_whole(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(tmp_path / "a", policy="sft", questions=0)
    (tmp_path / "a" / "of-before").write_text("")
    with pytest.raises(UserError, match="holds an earlier export; --force replaces it"):
        exported(tmp_path / "a", questions=0)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export, "compare_with_unmerged", interrupted)
        for name in ("a", "b"):
            with pytest.raises(KeyboardInterrupt):
                exported(tmp_path / name, force=True)
    assert json.loads((tmp_path / "a" / export.FACTS).read_text())["policy"] == "sft"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "project"]
    assert exported(tmp_path / "a", force=True, questions=0)[0]["policy"] == "dpo"
    assert not (tmp_path / "a" / "of-before").exists()


def test_what_a_killed_export_left_is_removed(project: Path, tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    kept = [f".a.{os.getppid()}.tmp", ".a.notes.tmp", f".b.{ended.pid}.tmp"]
    for name in (*kept, f".a.{ended.pid}.tmp"):
        (tmp_path / name).mkdir()
    exported(tmp_path / "a", policy="base", questions=0)
    assert sorted(path.name for path in tmp_path.glob(".*")) == sorted(kept)


def test_checkpoints_without_a_manifest_or_of_another_version(project: Path, tmp_path: Path) -> None:
    manifest = Path("checkpoints/dpo_coherence_lora/manifest.json")
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**values, "params": {"prompt": {"template": "{question}"}}}))
    with pytest.raises(UserError, match="dpo was made by another version of this project"):
        exported(tmp_path / "a")
    manifest.unlink()
    with pytest.raises(UserError, match=r"dpo_coherence_lora: has no manifest\.json"):
        exported(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_checkpoints_that_are_not_here_and_a_full_disk(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"0\.0 GB are free, the export takes 0\.0 GB"),
    ):
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        exported(tmp_path / "a")
    shutil.rmtree("checkpoints/dpo_coherence_lora")
    with pytest.raises(
        UserError, match=r"dpo_coherence_lora: is missing; run `dvc repro` to train it, or `dvc pull`"
    ):
        exported(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_folder_that_git_would_take_is_told(project: Path) -> None:
    subprocess.run(["git", "init", "--quiet"], check=True)
    Path(".gitignore").write_text("/ignored/\n")
    for name, told in (("seen", True), ("ignored", False)):
        words = exported(Path(name), policy="base", questions=0)[1]
        assert ("`git add` would take the weights" in " ".join(words.split())) is told
