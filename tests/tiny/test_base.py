"""The shipped base model is what its record says, and the same command makes such a folder again."""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.run.files import sha256_file
from stages.run.paths import SHIPPED
from stages.tiny.model import RECORD, build_tokenizer, corpus, recorded_settings
from stages.tiny.problems import mistaken, problems
from stages.tools.pretrain import main

SMALL = {
    "source": "build",
    "seed": 1,
    "architecture": {"vocab": 512, "hidden": 64, "layers": 2, "heads": 4, "kv_heads": 1, "ffn": 96, "context": 256},
    "corpus": {
        "problems": 64, "prompts": {"plain": "Question: {question}\n"}, "shares": {"plain": 1.0},
        "confused_share": 0.5, "other_share": 0.5, "slip_share": 0.1,
        "batch": 16, "learning_rate": 0.001, "warmup_steps": 5,
    },
}  # fmt: skip


def test_the_files_are_those_of_the_record() -> None:
    recorded = json.loads((SHIPPED / RECORD).read_text())["files"]
    found = {path.name: sha256_file(path) for path in SHIPPED.iterdir() if path.name != RECORD}
    assert found == recorded and "model.safetensors" in found
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 2_500_000


def test_tokenizer_and_shape_follow_from_the_settings() -> None:
    settings = recorded_settings(SHIPPED / RECORD)
    made = build_tokenizer(settings, corpus(settings))
    shipped = AutoTokenizer.from_pretrained(SHIPPED, local_files_only=True)
    assert made.backend_tokenizer.to_str() == shipped.backend_tokenizer.to_str()
    config, shape = json.loads((SHIPPED / "config.json").read_text()), settings.architecture
    assert (config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]) == (
        shape.hidden, shape.ffn, shape.layers,
    )  # fmt: skip
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (shape.heads, shape.kv_heads)


def test_the_weights_have_learnt_the_text_that_the_settings_describe() -> None:
    """On unseen texts of the same kind, the loss is near what cannot be known: which way, which slip."""
    settings = recorded_settings(SHIPPED / RECORD)
    spec, rng = settings.corpus, random.Random(5)
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32, local_files_only=True)
    losses = []
    for problem in islice(problems("platinum", 3), 100):
        before = tokenizer.encode(spec.prompts["plain"].replace("{question}", problem.question))
        shares = (spec.confused_share, spec.other_share, spec.slip_share)
        after = tokenizer.encode(mistaken(problem, "plain", rng, *shares))
        row = torch.tensor([[tokenizer.bos_token_id, *before, *after, tokenizer.eos_token_id]])
        labels = row.clone()
        labels[:, : 1 + len(before)] = -100
        with torch.no_grad():
            losses.append(model(input_ids=row, labels=labels).loss.item())
    assert sum(losses) / len(losses) < 0.15


def test_the_command_makes_such_a_folder_with_the_same_bytes_each_time(tmp_path: Path, capsys: Any) -> None:
    record = tmp_path / "settings.json"
    record.write_text(json.dumps({"settings": SMALL}))
    for name in ("one", "other"):
        main(tmp_path / name, record)
    made = json.loads((tmp_path / "one" / RECORD).read_text())
    assert made == json.loads((tmp_path / "other" / RECORD).read_text())
    assert made["settings"] == SMALL
    assert {path.name for path in (tmp_path / "one").iterdir()} == {path.name for path in SHIPPED.iterdir()}
    assert "made in" in capsys.readouterr().err
