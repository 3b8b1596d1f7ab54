"""export: a folder that answers as the policy does, a card that says what was measured, and nothing half made.

The models are random and small; tests/pipeline/test_export.py exports a trained one and loads it elsewhere.
"""

from __future__ import annotations

import contextlib
import errno
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
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from stages.policy.adapter import adapter_config, adapter_weights, save_adapter
from stages.run.errors import UserError
from stages.run.files import read_jsonl, write_json, write_jsonl
from stages.run.params import load_params
from stages.run.paths import BASE, LAST, PLATINUM, PLATINUM_DETAILS, PLATINUM_EVAL
from stages.run.rounds import adapter_of, trainer_of
from stages.run.stage import write_manifest
from stages.stats.one import summarise
from stages.text.answers import read_answer
from stages.tools import export
from tests.policy import greedy, make_project

QUESTIONS = [export.EXAMPLE, *(f"Ben has {n} pens and gets {n + 1}. How many?" for n in range(7))]
CHAT_PROMPT = {
    "chat": True, "system": "It's `brief` \"here\".", "opening": "<think>\n", "default": "plain",
    "styles": {"plain": "{question}\nEnd it with '#### '.", "direct": "{question}"},
    "completion": "<think>\n{solution}",
}  # fmt: skip
WEIGHTS = "adapter_model.safetensors"
POLICIES = ("base", "sft", "dpo")


def make(root: Path, policies: Iterable[str] = POLICIES, **options: Any) -> None:
    """A run by hand in `root`: random base and adapters, evaluated, with the manifests a run writes."""
    model = make_project(root, **options)
    with contextlib.chdir(root):
        _make_checkpoints(model)
        _make_evaluations(policies)


def _make_checkpoints(model: Any) -> None:
    for name, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
        values = json.loads((BASE / name).read_text())
        (BASE / name).write_text(json.dumps({**values, key: "/home/someone/model"}))
    sections = load_params().model_dump(mode="json")
    hub = {"source": "hub", "id": "some_one/A|b*<i>", "revision": "c0ffee"}
    write_manifest({"stage": "base", "params": {"model": hub}, "inputs": {}}, [BASE])
    PLATINUM.parent.mkdir(parents=True)
    rows = [{"id": f"p{n}", "question": text, "gold": "1"} for n, text in enumerate(QUESTIONS)]
    write_jsonl(PLATINUM, rows)
    data = {"source": "files", "train": "/home/someone/train.jsonl", "platinum": "/home/someone/p.jsonl"}
    write_manifest({"stage": "prepare", "params": {"data": data}, "inputs": {}}, [PLATINUM.parent])
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(model, lora)
    for policy in POLICIES:
        if folder := adapter_of(policy):
            for name, weight in tuned.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(weight, std=0.05)
            folder.mkdir(parents=True)
            save_adapter(adapter_weights(tuned), adapter_config(tuned), folder)
            used = {name: sections[name] for name in (policy, "prompt", "seed")}
            inputs = {BASE.as_posix(): sha256(BASE)}
            write_manifest({"stage": trainer_of(policy), "params": used, "inputs": inputs}, [folder])


def sha256(path: Path) -> str:
    return hashlib.sha256((path / "manifest.json" if path.is_dir() else path).read_bytes()).hexdigest()


def _make_evaluations(policies: Iterable[str]) -> None:
    """Greedy answers as the evaluation makes them; the verdicts are made up, so that there are some of both."""
    sections = load_params().model_dump(mode="json")
    for policy in policies:
        place, adapter = POLICIES.index(policy), adapter_of(policy)
        rows = []
        for number, (text, tokens, finish) in enumerate(greedy(adapter, QUESTIONS)):
            answer, correct = read_answer(text, QUESTIONS[number]).answer, number <= 2 * place
            graded = {
                "completion": text,
                "answer": answer,
                "correct": correct,
                "tokens": tokens,
                "finish": finish,
            }
            more = {"leak": False, "answers_found": 1, "flexible_answer": answer, "flexible_correct": correct}
            rows.append({"id": f"p{number}", "question": QUESTIONS[number], "gold": "1", **graded, **more})
        paths = [PLATINUM_EVAL / f"{policy}.jsonl", PLATINUM_DETAILS / f"{policy}.json"]
        write_jsonl(paths[0], rows)
        write_json(paths[1], summarise(rows, 0))
        inputs = {path.as_posix(): sha256(path) for path in (PLATINUM, BASE, adapter) if path}
        used = {name: sections[name] for name in ("evaluate", "prompt", "seed")}
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


def exported(folder: Path, **options: Any) -> tuple[dict[str, Any], str, str]:
    """The facts, the card on one line, and what was printed."""
    with contextlib.redirect_stdout(io.StringIO()) as stream:
        export.main(folder, **options)
    card = " ".join((folder / export.CARD).read_text().split())
    return json.loads((folder / export.FACTS).read_text()), card, stream.getvalue()


def run_card(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the card's own code prints."""
    capsys.readouterr()
    text = (folder / export.CARD).read_text()
    code = re.findall(r"^```+python\n(.*?)^```+$", text, re.MULTILINE | re.DOTALL)[0]
    with contextlib.chdir(folder):
        exec(compile(code, "README.md", "exec"), {})
    return capsys.readouterr().out.removesuffix("\n")


def evaluated(policy: str) -> list[dict[str, Any]]:
    return list(read_jsonl(PLATINUM_EVAL / f"{policy}.jsonl"))


@pytest.mark.parametrize("policy", ["base", "sft", "dpo"])
def test_the_card_s_code_gives_the_evaluation_s_answer(
    project: Path, capsys: pytest.CaptureFixture[str], policy: str
) -> None:
    """All of the declared end tokens end it; the base's penalties and sampling do not count."""
    facts, _, printed = exported(project.parent / policy, policy=policy)
    assert run_card(project.parent / policy, capsys) == evaluated(policy)[0]["completion"]
    found = facts["unmerged"]
    assert (found["questions"], found["changed_answers"], found["changed_texts"]) == (8, 0, 0)
    assert found["largest_logit_difference"] < 1e-4
    assert found["logit_positions"] == sum(row["tokens"] + 1 for row in evaluated(policy))
    assert "0 greedy answers changed (0%)" in printed


def test_a_tokenizer_that_begins_by_itself_and_one_that_does_not(project: Path, tmp_path: Path) -> None:
    assert "Sent as text, it needs `<s>` in front" in exported(tmp_path / "a", questions=0)[1]
    make(tmp_path / "begins", begins=True, policies=[])
    with contextlib.chdir(tmp_path / "begins"):
        assert "As text it can be sent as it is" in exported(tmp_path / "b", questions=0)[1]


def test_a_chat_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "chat", prompt=CHAT_PROMPT, policies=["dpo"])
    with contextlib.chdir(tmp_path / "chat"):
        card = exported(tmp_path / "out")[1]
        assert run_card(tmp_path / "out", capsys) == evaluated("dpo")[0]["completion"]
    assert "opens the answer with `<think>`" in card and "It's `brief`" in card


def test_the_result_is_that_of_these_weights(project: Path, tmp_path: Path) -> None:
    facts, card, printed = exported(tmp_path / "a", questions=3)
    assert (facts["result"]["questions"], facts["result"]["accuracy"]) == (8, 5 / 8)
    compared = [(one["with"], one["gained"], one["lost"]) for one in facts["comparisons"]]
    assert compared == [("base", 4, 0), ("SFT", 2, 0)]
    assert "8 questions, greedy decoding: **62.5 %** (95 % interval 30.6 % to 86.3 %)" in card
    assert "Against SFT on the same questions: +25.0 points" in card
    assert "62.5 % (30.6–86.3)" in printed
    # Changed figures are no result, and neither is no evaluation.
    details = PLATINUM_DETAILS / "dpo.json"
    details.write_text(details.read_text().replace("0.625", "0.925"))
    assert exported(tmp_path / "b", questions=0)[0]["result"] is None
    (PLATINUM_EVAL / "dpo.manifest.json").unlink()
    facts, card, printed = exported(tmp_path / "c", questions=0)
    assert facts["result"] is None and facts["comparisons"] == []
    assert "Platinum: no evaluation of these weights is here" in printed
    assert "No result: no evaluation of these weights is here." in card


def test_changed_weights_are_not_exported_and_changed_parents_are_told(project: Path, tmp_path: Path) -> None:
    PLATINUM.write_text('{"id": "p0", "question": "Why?", "gold": "1"}\n')
    facts, card, printed = exported(tmp_path / "a", questions=0)
    assert facts["result"] is None
    assert any(PLATINUM.as_posix() in link for link in facts["broken"])
    assert f"WARNING {PLATINUM}" in printed
    assert "Take the settings below with care" in card
    weights = LAST.adapter / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors, written by dpo@dpo, differs"):
        exported(tmp_path / "b")
    assert exported(tmp_path / "b", policy="sft", questions=0)[0]["policy"] == "sft"
    write_manifest({"stage": "base", "params": {}, "inputs": {}}, [BASE])  # built again, as another one
    with pytest.raises(UserError, match=r"checkpoints/base, read by sft, differs"):
        exported(tmp_path / "c", policy="sft")


def test_nothing_private_is_in_the_folder_and_text_is_escaped(project: Path, tmp_path: Path) -> None:
    card = exported(tmp_path / "a")[1]
    for path in (tmp_path / "a").iterdir():
        text = path.read_bytes()
        assert b"/home/someone" not in text and str(tmp_path).encode() not in text, path
    assert 'base_model: "some_one/A|b*<i>"' in card and "# license: " in card
    assert r"# A\|b\*\<i\>, SFT and DPO" in card
    assert "revision c0ffee" in card
    readable = (tmp_path / "a" / export.FACTS).stat().st_mode & 0o777
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "a").iterdir()} == {readable}
    assert export.code("a `b` c") == "`` a `b` c ``"
    assert export.code("```\nx\n```", "python") == "````python\n```\nx\n```\n````"
    assert export.escape_markdown("a\n<b> & [c](d) _e_") == r"a \<b\> &amp; \[c\](d) \_e\_"


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", [None, "bf16", "fp16", "fp32"])
def test_the_sum_is_made_in_32_bits_and_rounded_once(
    project: Path, monkeypatch: pytest.MonkeyPatch, base: torch.dtype, precision: str | None
) -> None:
    AutoModelForCausalLM.from_pretrained(BASE, dtype=base).save_pretrained(BASE)
    monkeypatch.setattr(export, "LARGEST_FILE", "20KB")
    facts = export.write_model("dpo", precision, 64, project.parent)
    written: dict[str, torch.Tensor] = {}
    for file in project.parent.glob("model-*.safetensors"):
        written |= load_file(file)
        assert file.stat().st_size < 40_000
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, None: base}[precision]
    adapter = load_file(LAST.adapter / WEIGHTS)
    before = load_file(BASE / "model.safetensors")
    assert written.keys() == before.keys()
    assert facts["parameters"] == sum(weight.numel() for weight in before.values())
    for name, weight in before.items():
        halves = [f"base_model.model.{name.removesuffix('weight')}lora_{half}.weight" for half in "BA"]
        exact = weight.float()
        if halves[0] in adapter:
            exact = exact + 2 * (adapter[halves[0]] @ adapter[halves[1]])
        assert torch.equal(written[name], exact.to(wanted)), name


def test_a_weight_too_large_for_fp16(project: Path) -> None:
    weights = load_file(BASE / "model.safetensors")
    weights["model.norm.weight"][0] = 70_000
    save_file(weights, BASE / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight: is too large for torch\.float16; choose"):
        export.write_model("dpo", "fp16", 64, project.parent / "out")
    assert export.write_model("dpo", "bf16", 64, project.parent / "out")["precision"] == "bf16"


def test_another_precision(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "LARGEST_FILE", "20KB")
    facts, _, printed = exported(tmp_path / "a", precision="bf16", questions=2)
    assert facts["precision"] == "bf16" and len(facts["files"]) > 1
    assert "dpo in bf16" in printed
    assert facts["unmerged"]["largest_logit_difference"] > 1e-3
    assert json.loads((tmp_path / "a/config.json").read_text())["dtype"] == "bfloat16"
    facts, card, _ = exported(tmp_path / "b", questions=0)
    assert facts["precision"] == "fp32"  # the base's
    assert "not compared with that policy" in card


@pytest.mark.parametrize(
    ("folder", "options", "words"),
    [
        ("checkpoints/base/x", {}, "must lie outside of this project"),
        (".", {"force": True}, "must lie outside of this project"),
        ("..", {"force": True}, "must lie outside of this project"),
        ("../full", {"force": True}, "is not empty and no earlier export"),
        ("../file", {}, "exists and is no folder"),
        ("../file/x", {}, "not exported ([Errno 17] File exists: '../file')"),
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

    def fail(error: BaseException) -> Any:
        def failing(*_: Any, **__: Any) -> None:
            raise error

        return failing

    full = OSError(errno.ENOSPC, "No space left on device")
    for owner, name, error, wanted in (
        (export, "compare_with_unmerged", KeyboardInterrupt(), KeyboardInterrupt),
        (PreTrainedModel, "save_pretrained", full, UserError),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail(error))
            for folder in ("a", "b"):
                with pytest.raises(wanted):
                    exported(tmp_path / folder, force=True)
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


def test_checkpoints_that_cannot_be_exported(project: Path, tmp_path: Path) -> None:
    """Of another version of the project, without a manifest, and not here at all."""
    manifest = LAST.adapter / "manifest.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**values, "params": {"prompt": {"template": "{question}"}}}))
    with pytest.raises(UserError, match="dpo was made by another version of this project"):
        exported(tmp_path / "a")
    manifest.unlink()
    with pytest.raises(UserError, match=r"dpo_coherence_lora/dpo: has no manifest\.json"):
        exported(tmp_path / "a")
    shutil.rmtree(LAST.adapter)
    with pytest.raises(UserError, match="lora/dpo: is missing; run `dvc repro` to train it, or `dvc pull`"):
        exported(tmp_path / "a")
    assert not (tmp_path / "a").exists()
