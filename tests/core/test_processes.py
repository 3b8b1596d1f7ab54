"""Training that runs out of memory: half the rows at once, on from the newest checkpoint, the same adapter."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import MistralConfig, MistralForCausalLM
from transformers.models.mistral.modeling_mistral import MistralModel

from stages import dpo, sft
from stages.core.errors import UserError
from stages.core.params import BuiltModel, Sections, load_params
from stages.core.paths import BASE, DPO_ADAPTER, SFT_ADAPTER
from stages.core.policy import read_adapter
from stages.core.processes import ROWS, train_everywhere
from stages.core.records import read_json, write_jsonl
from stages.core.stage import StageRun
from stages.tiny.model import build_tokenizer, corpus
from stages.tiny.problems import problems

SMALL = Path(__file__).resolve().parents[1] / "small"
STEPS = 6
CHANGES = {
    "batch: 16\n  learning_rate: 5e-4": "batch: 8\n  learning_rate: 1e-2",  # sft
    "batch: 16\n  learning_rate: 2.0e-4": "batch: 8\n  learning_rate: 1e-2",  # dpo
    "examples: 20": f"examples: {8 * STEPS}",
    "checkpoint_steps: 10": "checkpoint_steps: 2",
    "dropout: 0.05": "dropout: 0.0",  # its draws would differ from one number of rows to another
    "select_steps: 20": "select_steps: 100",
    "select_questions: 5": "select_questions: 1",
    "select_max_new_tokens: 64": "select_max_new_tokens: 4",
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random base model, training problems and pairs, and parameters for six steps without dropout."""
    shutil.copytree(SMALL, tmp_path, dirs_exist_ok=True)
    profile = tmp_path / "profiles" / "small.yaml"
    text = profile.read_text()
    for old, new in CHANGES.items():
        assert old in text
        text = text.replace(old, new)
    profile.write_text(text)
    monkeypatch.chdir(tmp_path)
    model = load_params().model
    assert isinstance(model, BuiltModel)
    tokenizer = build_tokenizer(model, corpus(model))
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=None, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(BASE)
    tokenizer.save_pretrained(BASE)
    made = [(one.question, one.answer) for one in islice(problems("train", 1), 8 * STEPS)]
    rows = [{"id": str(i), "question": q, "answer": a, "gold": "1"} for i, (q, a) in enumerate(made)]
    pairs = [{"prompt": q, "chosen": a, "rejected": "#### 7"} for q, a in made]
    for path, content in ((sft.TRAIN, rows), (dpo.PAIRS, pairs), (dpo.VALID, rows[:1])):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, content)
    return tmp_path


def start(stage: str, work: Path, **hardware: Any) -> str:
    """Run a training stage's work as its `main` does; returns what it said."""
    params = load_params()
    params = params.model_copy(update={"hardware": params.hardware.model_copy(update=hardware)})
    said = Console(file=io.StringIO(), width=200)
    work.mkdir(exist_ok=True)
    run = StageRun(stage, Sections(params, (stage, "prompt", "seed")), work, said)
    train_everywhere(f"stages.{stage}:train", run, getattr(params, stage).batch)
    return said.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], list[int]]:
    """Makes a training pass over more than `most` rows run out of memory, from that many passes on."""

    def limit(most: int, after: int) -> list[int]:
        seen: list[int] = []
        forward = MistralModel.forward

        def limited(self: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                seen.append(len(input_ids))
                if len(seen) > after and len(input_ids) > most:
                    raise torch.OutOfMemoryError("simulated")
            return forward(self, input_ids, *args, **kwargs)

        monkeypatch.setattr(MistralModel, "forward", limited)
        return seen

    return limit


@pytest.mark.parametrize(
    ("stage", "adapter", "sequences"), [("sft", SFT_ADAPTER, 1), ("dpo", DPO_ADAPTER, 2)]
)
def test_half_the_rows_from_the_newest_checkpoint(
    project: Path, memory: Callable[[int, int], list[int]], stage: str, adapter: Path, sequences: int
) -> None:
    """Memory runs out in the fourth step, after the checkpoint of the second; and again with half the rows.

    The steps after the checkpoint are done again with a quarter of the rows, and the adapter is the one that
    a quarter of the rows would have given from the start.
    """
    if stage == "dpo":
        start("sft", project / "sft")
    start(stage, project / "small", per_device_batch=2)
    wanted = read_adapter(adapter)
    shutil.rmtree(adapter)
    # DPO's validation is without gradients, so it is not counted; each step of 8 rows is one pass.
    seen = memory(2 * sequences, 3)
    said = start(stage, project / "large", per_device_batch=8)
    assert f"{stage}  out of memory with 8 rows at once; going on with 4" in said
    assert f"{stage}  out of memory with 4 rows at once; going on with 2" in said
    four_passes = [8 * sequences] * 4
    rest = [2 * sequences] * (4 * (STEPS - 2))
    assert seen == [*four_passes, 4 * sequences, *rest]
    got = read_adapter(adapter)
    assert got.keys() == wanted.keys() and wanted
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-4, rtol=1e-3)
    assert any(tensor.abs().max() > 1e-2 for name, tensor in wanted.items() if "lora_B" in name)


def test_one_row_that_does_not_fit(project: Path, memory: Callable[[int, int], list[int]]) -> None:
    """Halving has an end, and says what else can be done."""
    memory(0, 0)
    with pytest.raises(UserError, match=r"sft: out of memory with one row at a time; set hardware\.gradient"):
        start("sft", project / "work", per_device_batch=2)


def test_activations_are_computed_again_first(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` gives up the activations it keeps before it takes fewer rows; after that only rows are left."""
    start("sft", project / "small", per_device_batch=2)
    wanted = read_adapter(SFT_ADAPTER)
    shutil.rmtree(SFT_ADAPTER)
    forward, most = MistralModel.forward, 8

    def limited(self: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        again = any(layer.gradient_checkpointing for layer in self.layers)
        if torch.is_grad_enabled() and (not again or len(input_ids) > most):
            raise torch.OutOfMemoryError("simulated")
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(MistralModel, "forward", limited)
    said = start("sft", project / "large", per_device_batch=8, gradient_checkpointing="auto")
    assert "sft  out of memory with 8 rows at once; going on with activations computed again" in said
    assert said.count("out of memory") == 1
    for name, tensor in read_adapter(SFT_ADAPTER).items():
        torch.testing.assert_close(tensor, wanted[name], atol=1e-4, rtol=1e-3)
    most = 0
    with pytest.raises(UserError, match=r"sft: out of memory with one row at a time; lower max_tokens"):
        start("sft", project / "none", per_device_batch=2, gradient_checkpointing="auto")


def test_a_model_that_does_not_fit(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that runs out before there are rows cannot be helped by fewer of them."""

    def load(*_: Any) -> Any:
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(sft, "load_base", load)
    (project / "work").mkdir()
    (project / "work" / ROWS).write_text('{"rows": 8, "checkpointing": false}')  # of an earlier run
    with pytest.raises(UserError, match="sft: the model does not fit into memory"):
        start("sft", project / "work")


ENTRY = """
import json, os
from pathlib import Path
import torch
from stages.core.processes import note_rows

def train(run):
    rows = run.rows_limit or 8
    note_rows(run, rows, True)
    with Path(f"process-{os.environ['RANK']}").open("a") as file:
        file.write(f"{rows} ")
    if rows > 4 and os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("simulated")
    if rows > 4:
        import time
        time.sleep(600)  # as in a sum that waits for the other one
"""


def test_one_of_two_processes_runs_out(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are started again with half the rows."""
    (project / "entry.py").write_text(ENTRY)
    path = os.pathsep.join([str(SMALL.parents[1]), str(project)])
    monkeypatch.setenv("PYTHONPATH", path)
    profile = project / "profiles" / "small.yaml"
    profile.write_text(profile.read_text().replace("processes: 1", "processes: 2"))
    params = load_params()
    run = StageRun("sft", Sections(params, ("sft",)), project / "work", Console(file=io.StringIO()))
    run.work.mkdir()
    train_everywhere("entry:train", run, 8)
    for rank in range(2):
        assert (project / f"process-{rank}").read_text() == "8 4 "
    assert read_json(run.work / ROWS) == {"rows": 4, "checkpointing": True}


def test_two_processes_agree_on_their_rows(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` looks at the memory that is free, which changes from one process to the next; both take the least."""
    start("sft", project / "one", per_device_batch=2)
    wanted = read_adapter(SFT_ADAPTER)
    shutil.rmtree(SFT_ADAPTER)
    profile = project / "profiles" / "small.yaml"
    text = profile.read_text().replace("processes: 1", "processes: 2")
    profile.write_text(text.replace("per_device_batch: 8", "per_device_batch: auto"))
    # Imported by each process at its start: the second one finds too little memory for more than one row.
    (project / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ.get('RANK') == '1':\n"
        "    from stages.core import memory\n"
        "    memory.cpu_device = lambda processes: memory.Device('CPU', False, 1, 1)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(project), str(SMALL.parents[1])]))
    start("sft", project / "two")
    assert read_json(project / "two" / ROWS) == {"rows": 1, "checkpointing": False}
    for name, tensor in read_adapter(SFT_ADAPTER).items():
        torch.testing.assert_close(tensor, wanted[name], atol=1e-4, rtol=1e-3)
