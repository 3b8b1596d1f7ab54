"""Training that runs out of memory, and training in several processes that fail in one way or another.

After memory ran out, training goes on from the newest checkpoint with fewer rows, and the adapter stays the same.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console
from transformers.models.mistral.modeling_mistral import MistralModel

from stages import sft
from stages.launch import local
from stages.launch.attempt import ROWS
from stages.launch.training import train_everywhere
from stages.policy.adapter import read_adapter
from stages.run.errors import UserError
from stages.run.files import read_json, read_jsonl, write_jsonl
from stages.run.params import BuiltModel, Sections, load_params
from stages.run.paths import BASE, LAST, TRAIN, VALID
from stages.run.resume import TRAINER
from stages.run.stage import StageRun
from stages.tiny.model import build_tokenizer, corpus
from stages.tiny.problems import problems
from tests.policy import SMALL, random_base

STEPS = 6
CHANGES = {
    "batch: 16\n  learning_rate: 5e-4": "batch: 8\n  learning_rate: 1e-2",  # sft
    "batch: 16\n  learning_rate: 2.0e-4": "batch: 8\n  learning_rate: 1e-2",  # dpo
    "examples: 20": f"examples: {8 * STEPS}",
    "checkpoint_steps: 10": "checkpoint_steps: 2",
    "dropout: 0.05": "dropout: 0.0",  # what it draws depends on the rows of a pass
    "steps: 10, questions: 5": "steps: 100, questions: 1",  # sft
    "steps: 20, questions: 5": "steps: 100, questions: 1",  # dpo
    "max_new_tokens: 64, level: 0.05": "max_new_tokens: 4, level: 1.0",
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
    random_base(
        0, vocab_size=len(tokenizer), hidden_size=32, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ).save_pretrained(BASE)  # fmt: skip
    tokenizer.save_pretrained(BASE)
    made = [(one.question, one.solution("steps")) for one in islice(problems("train", 1), 8 * STEPS)]
    rows = [{"id": str(i), "question": q, "solution": a, "gold": "1"} for i, (q, a) in enumerate(made)]
    pairs = [{"prompt": q, "chosen": a, "rejected": "#### 7"} for q, a in made]
    for path, content in ((TRAIN, rows), (LAST.pairs, pairs), (VALID, rows[:1])):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, content)
    return tmp_path


def start(stage: str, work: Path, entry: str = "", **hardware: Any) -> str:
    """Run the training of a stage as its `main` does; returns what it printed."""
    params = load_params()
    params = params.model_copy(update={"hardware": params.hardware.model_copy(update=hardware)})
    said = Console(file=io.StringIO(), width=200)
    work.mkdir(exist_ok=True)
    label = stage if stage == "sft" else f"{stage}@{LAST.round}"
    run = StageRun(label, Sections(params, (stage, "prompt", "seed"), label.partition("@")[2]), work, said)
    train_everywhere(entry or f"stages.{stage}:train", run, getattr(params, stage).batch)
    return said.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def trained(work: Path) -> dict[str, torch.Tensor]:
    """The adapter after the last step. The stage's output is the zero step, because a random model is never right."""
    return read_adapter(work / TRAINER / f"checkpoint-{STEPS}")


def assert_close(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Fails unless an adapter was trained and equals `wanted`, up to rounding."""
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-4, rtol=1e-3)
    assert any(tensor.abs().max() > 1e-2 for name, tensor in wanted.items() if "lora_B" in name)


# ---- Out of memory -----------------------------------------------------------------------------------


@pytest.fixture
def limit_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], list[int]]:
    """A function that makes training passes over more than `most` tokens run out of memory, after `after` passes.

    Padding counts. It returns the rows of each pass.
    """

    def limit(most: int, after: int) -> list[int]:
        seen: list[int] = []
        forward = MistralModel.forward

        def limited(self: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                seen.append(len(input_ids))
                if len(seen) > after and input_ids.numel() > most:
                    raise torch.OutOfMemoryError("simulated")
            return forward(self, input_ids, *args, **kwargs)

        monkeypatch.setattr(MistralModel, "forward", limited)
        return seen

    return limit


@pytest.mark.parametrize(("stage", "sequences"), [("sft", 1), ("dpo", 2)])
def test_half_the_rows_from_the_newest_checkpoint(
    project: Path, limit_memory: Callable[[int, int], list[int]], stage: str, sequences: int
) -> None:
    """Memory runs out in the fourth step, after the checkpoint of the second, and again with half the rows.

    The steps after the checkpoint are done again with a quarter of the rows. The adapter is the same as when all
    steps take a quarter of the rows.
    """
    if stage == "dpo":
        start("sft", project / "sft")
    start(stage, project / "small", per_device_batch=2)
    wanted = trained(project / "small")
    # Validation has no gradients and is not counted. Each step of 8 rows is one pass. Two rows, or three short
    # ones, are at most 310 tokens; half a batch is more than 350.
    seen = limit_memory(330 * sequences, 3)
    said = start(stage, project / "large", per_device_batch=8)
    assert f"{stage}  out of memory with 8 rows; trying again with 4" in said
    assert f"{stage}  out of memory with 4 rows; trying again with 2" in said
    assert seen[:4] == [8 * sequences] * 4
    rest = seen[5:]  # without the pass over half a batch
    assert len(rest) == 4 * (STEPS - 2)
    assert {sum(rest[at : at + 4]) for at in range(0, len(rest), 4)} == {8 * sequences}
    assert_close(trained(project / "large"), wanted)


def test_gradient_checkpointing_is_tried_first(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` turns it on before it takes fewer rows. When not even one row fits, an error says what to do."""
    start("sft", project / "small", per_device_batch=2)
    wanted = trained(project / "small")
    forward, most = MistralModel.forward, 8

    def limited(self: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        checkpointing = any(layer.gradient_checkpointing for layer in self.layers)
        if torch.is_grad_enabled() and (not checkpointing or len(input_ids) > most):
            raise torch.OutOfMemoryError("simulated")
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(MistralModel, "forward", limited)
    said = start("sft", project / "large", per_device_batch=8, gradient_checkpointing="auto")
    assert "sft  out of memory with 8 rows; trying again with gradient checkpointing" in said
    assert said.count("out of memory") == 1
    assert_close(trained(project / "large"), wanted)
    most = 0
    for setting, advice in (("auto", "lower max_tokens"), (False, r"set hardware\.gradient_checkpointing")):
        with pytest.raises(UserError, match=f"sft: out of memory with a single row; {advice}"):
            start("sft", project / "none", per_device_batch=2, gradient_checkpointing=setting)


def test_a_model_that_does_not_fit(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If memory runs out while the model is loaded, fewer rows cannot help."""

    def load(*_: Any) -> Any:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    monkeypatch.setattr(sft, "load_base", load)
    (project / "work").mkdir()
    (project / "work" / ROWS).write_text('{"rows": 8, "checkpointing": false}')  # of an earlier run
    with pytest.raises(UserError, match="sft: the model does not fit into memory"):
        start("sft", project / "work")


# ---- Several processes -------------------------------------------------------------------------------

ENTRY = """
import os, signal, time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
import torch
from accelerate import PartialState
from peft import LoraConfig
from torch.distributed import distributed_c10d
from stages import dpo, sft
from stages.launch import memory
from stages.launch.attempt import END, ROWS, fit_rows
from stages.policy.adapter import load_base
from stages.train.pair_trainer import PairTrainer
from stages.run.errors import UserError
from stages.run.files import write_json

RANK = os.environ.get("RANK")

def little_memory(run, most):
    if RANK == "1":
        memory.cpu_device = lambda processes: memory.Device("CPU", False, 1, 1)
    sft.train(run, most)

def begin(run, most):
    rows = most or 8
    with Path(f"process-{RANK}").open("a") as file:
        file.write(f"{os.getpid()} {rows}\\n")
    if RANK == "0":
        write_json(run.work / ROWS, {"rows": rows, "checkpointing": True})
    while RANK == "1" and not ((run.work / ROWS).is_file() and Path("process-0").is_file()):
        time.sleep(0.01)
    return rows

def wait():
    time.sleep(600)  # as in a sum to which the other process contributes

def runs_out(run, most):
    if begin(run, most) > 4:
        if RANK == "1":
            raise torch.OutOfMemoryError("simulated")
        while not (run.work / END).is_file():
            time.sleep(0.001)
        raise RuntimeError("connection closed by peer")

def killed(run, most):
    begin(run, most)
    if RANK == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    wait()

def mistaken(run, most):
    begin(run, most)
    raise UserError("data/x.jsonl: no pair to train on")

def broken(run, most):
    begin(run, most)
    if RANK == "1":
        raise ValueError("a bug")
    wait()

def waiting(run, most):
    begin(run, most)
    wait()

def counting(run, most):
    seen, compute = [], PairTrainer.compute_loss
    def counted(self, model, inputs, *args, **kwargs):
        seen.append(len(inputs["input_ids"]) // 2)
        return compute(self, model, inputs, *args, **kwargs)
    PairTrainer.compute_loss = counted
    dpo.train(run, most)
    write_json(Path(f"pairs-{RANK}"), seen)

def joining(run, most):
    model, _ = load_base()
    fit_rows(run, run.params.sft, SimpleNamespace(peft_config={"default": LoraConfig(r=4)}, config=model.config,
        parameters=model.parameters, get_memory_footprint=model.get_memory_footprint), 50, most)
    PartialState(timeout=timedelta(seconds=1))  # as the trainer does later
    options = distributed_c10d._get_default_group()._get_backend(torch.device("cpu")).options
    Path(f"patience-{RANK}").write_text(str(options._timeout.total_seconds()))
"""


@pytest.fixture
def start_two(project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """A function that starts one of the functions in ENTRY in two processes."""
    (project / "entry.py").write_text(ENTRY)
    profile = project / "profiles" / "small.yaml"
    text = profile.read_text().replace("processes: 1", "processes: 2")
    profile.write_text(text.replace("per_device_batch: 8", "per_device_batch: auto"))
    monkeypatch.syspath_prepend(str(project))  # the processes inherit it
    return lambda function, stage="sft": start(stage, project / "work", f"entry:{function}")


def fork(patch: pytest.MonkeyPatch) -> None:
    """Fork the processes instead, for tests in which they do not train: their imports would take most of the time."""
    start_processes = local.start_processes
    patch.setattr(
        local, "start_processes", lambda *given, **named: start_processes(*given, **{**named, "start_method": "fork"})
    )  # fmt: skip


def rows_of(rank: int) -> list[int]:
    return [int(line.split()[1]) for line in Path(f"process-{rank}").read_text().splitlines()]


def running() -> list[int]:
    """The processes of ENTRY that have not ended."""
    lines = [line for path in Path().glob("process-*") for line in path.read_text().splitlines()]
    ids = [int(line.split()[0]) for line in lines]
    return [
        pid for pid in ids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    ]


def test_one_of_two_processes_runs_out_of_memory(
    project: Path,
    start_two: Callable[[str], str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both start again with half the rows. That the other one lost its connection is not shown."""
    fork(monkeypatch)
    said = start_two("runs_out")
    assert "sft  out of memory with 8 rows; trying again with 4" in said
    assert rows_of(0) == rows_of(1) == [8, 4]
    assert read_json(project / "work" / ROWS) == {"rows": 4, "checkpointing": True}
    assert capfd.readouterr().err == ""
    assert running() == []


@pytest.mark.parametrize(
    ("function", "error", "shown"),
    [
        ("killed", r"sft: training process 1 of 2 ended with status -9; .* Run the same command again", ""),
        ("broken", r"sft: training process 1 of 2 ended with status 1; what it said is above", "ValueError: a bug"),
        ("mistaken", r"^data/x\.jsonl: no pair to train on$", ""),
    ],
)  # fmt: skip
def test_a_process_that_fails(
    start_two: Callable[[str], str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    error: str,
    shown: str,
) -> None:
    """The user reads one line, the traceback of a bug above it, and the other process ends too."""
    fork(monkeypatch)
    with pytest.raises(UserError, match=error) as found:
        start_two(function)
    assert "\n" not in str(found.value)
    printed = capfd.readouterr().err
    assert printed.count("Traceback") == bool(shown)
    assert shown in printed
    assert running() == []


def test_nothing_is_left_running_when_the_parent_is_killed(
    project: Path, start_two: Callable[[str], str]
) -> None:
    repository, tests = SMALL.parents[1], Path(__file__).parent
    code = "import pytest; from pathlib import Path; from test_training import fork, start\n"
    code += "fork(pytest.MonkeyPatch()); start('sft', Path('work'), 'entry:waiting')"
    path = os.pathsep.join(map(str, (repository, tests, project)))
    parent = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path})
    while len(running()) < 2:
        assert parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    ended = time.monotonic() + 30
    while running():
        assert time.monotonic() < ended
        time.sleep(0.05)


def test_two_processes_agree_on_their_rows(project: Path, start_two: Callable[[str], str]) -> None:
    """`auto` looks at the free memory, which differs between processes. Both take the smaller number."""
    start("sft", project / "one", per_device_batch=2, processes=1)
    wanted = trained(project / "one")
    start_two("little_memory")
    assert read_json(project / "work" / ROWS) == {"rows": 1, "checkpointing": False}
    assert_close(trained(project / "work"), wanted)


def test_processes_take_as_many_tokens_not_pairs(project: Path, start_two: Callable[..., str]) -> None:
    """One takes the few long pairs of a batch, the other the many short ones; they learn what one process does."""
    answer = "3*4=12. " * 9
    pairs = list(read_jsonl(LAST.pairs, {"chosen": str}))
    for pair in pairs[::5]:
        pair["chosen"] = answer + pair["chosen"]
    write_jsonl(LAST.pairs, pairs)
    start("sft", project / "sft")
    start("dpo", project / "one", per_device_batch=8, processes=1)
    wanted, curve = trained(project / "one"), LAST.curve.read_text()
    start_two("counting", "dpo")
    counts = list(zip(*(read_json(project / f"pairs-{rank}") for rank in (0, 1)), strict=True))
    assert [sum(pair) for pair in counts] == [8] * STEPS
    assert any(min(pair) < 4 for pair in counts)
    assert_close(trained(project / "work"), wanted)
    for one, two in zip(curve.splitlines()[1:], LAST.curve.read_text().splitlines()[1:], strict=True):
        assert [*map(float, two.split(","))] == pytest.approx(
            [*map(float, one.split(","))], rel=1e-2, abs=1e-3
        )


def test_processes_wait_two_hours_for_each_other(project: Path, start_two: Callable[[str], str]) -> None:
    """While DPO trains, one may answer for longer than the half hour after which NCCL gives up by default."""
    start_two("joining")
    assert [Path(f"patience-{rank}").read_text() for rank in (0, 1)] == ["7200.0", "7200.0"]
