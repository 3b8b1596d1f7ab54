"""check: finds mistakes before a run, and shows every stage's first prompt, without running anything."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from stages.launch import memory
from stages.run.errors import UserError
from stages.run.params import load_params
from stages.tools import check

REPO = Path(__file__).resolve().parents[2]
SMALL = REPO / "tests" / "small"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the tests' own parameters and a scorer, on a machine without a GPU."""
    shutil.copytree(SMALL, tmp_path, dirs_exist_ok=True)
    (tmp_path / "scorer.py").write_text("def score_group(question, trajectories):\n    raise SystemExit\n")
    monkeypatch.chdir(tmp_path)
    for name in ("NVIDIA", "WINDOWS"):
        monkeypatch.setattr(check, name, tmp_path / "no-driver")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path


def change(workplace: Path, old: str, new: str) -> None:
    profile = workplace / "profiles" / "small.yaml"
    text = profile.read_text()
    assert old in text
    profile.write_text(text.replace(old, new, 1))


def make_chat(workplace: Path) -> None:
    change(workplace, "chat: false", "chat: true\n  system: Be exact.")
    change(workplace, "two: {style: direct,", "two: {style: direct, system: Be brief.,")


def output(gpu_memory: float | None = None) -> str:
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as stream:
        patch.setenv("COLUMNS", "120")
        check.main(gpu_memory)
    return stream.getvalue()


def refusal() -> tuple[str, str]:
    """The error and what was printed before it."""
    with contextlib.redirect_stdout(io.StringIO()) as stream, pytest.raises(UserError) as error:
        check.main()
    return str(error.value), stream.getvalue()


def test_prompts_of_every_stage_that_builds_one(workplace: Path) -> None:
    """SFT's prompt and completion, a rollout prompt per style, DPO's and evaluate's; nothing is written."""
    (workplace / "data" / "gsm8k").mkdir(parents=True)
    row = {"id": "train-00000", "question": "Why [bold]?", "solution": "<<1+1=2>>\n#### 2", "gold": "2"}
    (workplace / "data" / "gsm8k" / "train.jsonl").write_text(json.dumps(row) + "\n")
    before = sorted(workplace.rglob("*"))
    text = output()
    assert "the first row of data/gsm8k/train.jsonl" in text and text.count("OK") == 3
    titles = [line.strip("─ ") for line in text.splitlines() if line.endswith("───")]
    assert [title.replace(":", ",").split(",")[0] for title in titles if title] == (
        ["sft", "sft", "rollout", "rollout", "dpo", "evaluate"]
    )
    assert text.count("Question: Why [bold]?\nAnswer:\n") == 4
    assert "rollout, style direct: two" in text and text.count("\nWhy [bold]?\n") == 1
    assert "<<1+1=2>>\n#### 2" in text
    assert sorted(workplace.rglob("*")) == before


def test_arms_with_one_prompt_are_shown_once(workplace: Path) -> None:
    """Arms that differ in temperature only put the question alike."""
    change(workplace, "two: {style: direct,", "two: {style: plain,")
    assert "rollout, style plain: one, two" in output()


def test_missing_files_are_all_listed(workplace: Path) -> None:
    """The table names each; the error is the first one and says there are more."""
    change(
        workplace,
        "source: generated\n  train: 30\n  valid: 5\n  platinum: 20\n  changed: one\n  wrong_labels: 0.1",
        "source: files\n  changed: one\n  valid: 5\n  tests: {svamp: {source: file, file: s.csv}}",
    )
    error, text = refusal()
    assert error == "own.train my.jsonl: there is no such file (and 2 more above)"
    assert "own.platinum held.jsonl" in text and "data.tests.svamp tests/s.csv" in text
    assert text.count("OK") == 3


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (None, "cannot be read (No such file"),
        ("def score_group(:\n", "not valid Python"),
        ("def score(question): ...\n", "defines no score_group"),
        ("class A:\n    def score_group(self): ...\n", "defines no score_group"),
    ],
)
def test_scorer_that_cannot_be_used(workplace: Path, source: str | None, words: str) -> None:
    """Found before the rollouts are paid for."""
    (workplace / "scorer.py").unlink()
    if source is not None:
        (workplace / "scorer.py").write_text(source)
    assert refusal()[0].startswith("regime_w.scorer scorer.py: " + words)


def test_scorer_is_read_not_run(workplace: Path) -> None:
    """A private scorer may import what is not here."""
    for source in (
        "from mine import score_group\n",
        "from mine import f as score_group\n",
        "score_group = print\n",
    ):
        (workplace / "scorer.py").write_text(source + "raise SystemExit\n")
        assert "OK" in output()


def use_directory(workplace: Path) -> Path:
    """Let the profile take the model from the folder `mine`."""
    text = (workplace / "profiles" / "small.yaml").read_text()
    built = text[text.index("model:\n") : text.index("prompt:\n")]
    change(workplace, built, "model:\n  source: directory\n  dtype: float32\n")
    folder = workplace / "mine"
    folder.mkdir()
    return folder


def test_model_directory(workplace: Path) -> None:
    """A folder that holds no model, or a part of one, is found before the night."""
    folder = use_directory(workplace)
    assert refusal()[0].startswith(
        "own.model mine: has no config.json; own.model must be a folder laid out as"
    )
    (folder / "config.json").write_text("{}")
    assert refusal()[0].startswith("own.model mine: config.json cannot be read (")


def test_chat_before_base_ran(workplace: Path) -> None:
    """The messages are shown, and why not the filled template."""
    make_chat(workplace)
    text = output()
    assert "a sample question (run `dvc repro prepare`" in text and "checkpoints/base is not there" in text
    assert "system: Be exact.\nuser: Question: " in text and "system: Be brief.\nuser: " in text


def save_base(workplace: Path, template: str | None) -> None:
    """A tokenizer of two words in checkpoints/base, with the manifest `base` would write."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")),
        unk_token="<unk>",
    )
    tokenizer.chat_template = template
    folder = workplace / "checkpoints" / "base"
    tokenizer.save_pretrained(folder)
    manifest: dict[str, Any] = {"params": {"model": load_params().model_dump(mode="json")["model"]}}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_chat_after_base_ran(workplace: Path) -> None:
    """The tokenizer's own template fills the prompts."""
    make_chat(workplace)
    save_base(
        workplace,
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|go|>{% endif %}",
    )
    text = output()
    assert "<|system|>Be exact.<|user|>Question: " in text and "<|system|>Be brief.<|user|>" in text
    assert text.count("<|go|>") == 5

    change(workplace, "seed: 1\n", "seed: 2\n")
    text = output()
    assert "checkpoints/base holds another model" in text and "<|go|>" not in text


def test_chat_without_template(workplace: Path) -> None:
    """A chat profile on a tokenizer without a template could not run."""
    make_chat(workplace)
    save_base(workplace, None)
    assert refusal()[0].startswith(
        "prompt.chat: is true, but the tokenizer has no chat template; set chat: false"
    )


def test_the_engine_is_named(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` takes vLLM on a GPU only, and nobody knows what is installed beside a GPU that is not here."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert ", engine transformers\n" in output()
    assert "engine" not in output(80)
    change(workplace, "engine: auto", "engine: vllm")
    assert refusal()[0].startswith("hardware.engine: vllm is not installed")


def test_a_gpu_that_torch_cannot_use(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A night on the processor, because the driver is too old, is prevented; one that was asked for is not."""
    (workplace / "no-driver").touch()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert re.match(r"GPU: torch 2.+ finds none, though the driver is here", refusal()[0])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "1 process on CPU" in output()


def test_a_gpu_for_which_no_kernel_can_be_built(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 29 GB are downloaded, one line says what to install."""
    (workplace / "no-driver").touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(check, "compiler_problem", lambda: "no C compiler")
    assert refusal()[0] == "GPU kernels: no C compiler"
    monkeypatch.setattr(check, "compiler_problem", lambda: "")
    assert re.search(r"GPU kernels +.* OK", output())


def test_no_torch(workplace: Path) -> None:
    """`check` answers at once: a plain profile imports neither torch nor transformers."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\nfrom stages.tools import check\ncheck.main()\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(REPO)], cwd=workplace, check=True, capture_output=True)


# ---- Does it fit? --------------------------------------------------------------------------------------


REVISION = "1" * 40
HUB = f"model:\n  source: hub\n  id: me/mine\n  revision: '{REVISION}'\n  dtype: bfloat16\n"
ABEL = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 32032, "torch_dtype": "float32",
}  # fmt: skip


def use_abel(workplace: Path, **hardware: str) -> None:
    """A 7B's config in the hub's cache, its weights not yet, and batches left to the estimate."""
    text = (workplace / "profiles" / "small.yaml").read_text()
    change(workplace, text[text.index("model:\n") : text.index("prompt:\n")], HUB)
    folder = workplace / "cache" / "models--me--mine" / "snapshots" / REVISION
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(ABEL))
    values = {
        "per_device_batch": "auto",
        "generation_batch": "auto",
        "gradient_checkpointing": "auto",
    } | hardware
    old = {
        "per_device_batch": "8",
        "generation_batch": "8",
        "gradient_checkpointing": "false",
        "processes": "1",
    }
    for key, value in values.items():
        change(workplace, f"  {key}: {old[key]}\n", f"  {key}: {value}\n")


def fits(gpu_memory: float | None = None) -> dict[str, list[str]]:
    """The cells of the table by stage."""
    table = re.split("rows at once|room for|first prompts", output(gpu_memory))[1]
    lines = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) == 4}


def test_what_fits_on_this_machine(workplace: Path) -> None:
    """The small model fits anywhere; numbers in the profile are kept."""
    table = fits()
    assert list(table) == ["sft", "dpo", "rollout", "evaluate"]
    assert {cells[2] for cells in table.values()} == {"yes"}
    assert table["sft"][1] == "8 rows x 2 passes = 16"
    assert table["evaluate"][1] == "up to 8"


def test_bf16_takes_the_room_of_32_bits_where_the_processor_lacks_it(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 7B: 14 GB of weights or 29, once loaded; on the disk and on a GPU 14 all the same."""
    use_abel(workplace)
    gib = []
    for bf16 in (True, False):
        monkeypatch.setattr(check, "computes_bf16", lambda bf16=bf16: bf16)
        gib.append([float(table["rollout"][0].split()[0]) for table in (fits(), fits(80))])
        assert room()["disk: base model, DVC's copy, training"] == pytest.approx(30, abs=2)
    (narrow, gpu), (wide, same_gpu) = gib
    assert wide > 1.5 * narrow and same_gpu == gpu


def test_larger_gpus_take_more_rows(workplace: Path) -> None:
    """A 7B: in 80 GiB with its activations kept, in 24 computed again, in 18 fewer rows; in 12 not even the weights."""
    use_abel(workplace)
    large, middle, small, none = fits(80), fits(24), fits(18), fits(12)
    assert large["sft"][1:] == ["8 rows x 2 passes = 16", "yes"]
    assert large["dpo"][1:] == ["4 pairs x 4 passes = 16", "yes"]
    assert middle["sft"][1:] == ["8 rows x 2 passes = 16, recomputing", "yes"]
    assert small["dpo"][2] == "yes"
    assert re.fullmatch(r"[12] pairs x (8|16) passes = 16, recomputing", small["dpo"][1])
    assert int(small["rollout"][1].split()[-1]) < int(large["rollout"][1].split()[-1])
    for cells in none.values():
        assert re.match(r"no: 1\d\.\d GiB before the first row; use a", cells[2])


def test_advice_for_what_does_not_fit(workplace: Path) -> None:
    """The setting that would help, and nothing that would not."""
    use_abel(workplace, per_device_batch="16", generation_batch="9999", gradient_checkpointing="false")
    change(workplace, "max_tokens: 256", "max_tokens: 8192")
    table = fits(40)
    assert table["sft"][2] == "no: lower hardware.per_device_batch"
    assert table["rollout"][2] == "no: lower hardware.generation_batch"
    change(workplace, "per_device_batch: 16", "per_device_batch: auto")
    assert fits(40)["sft"][2] == "no: set hardware.gradient_checkpointing: auto"
    change(workplace, "gradient_checkpointing: false", "gradient_checkpointing: auto")
    change(workplace, "max_tokens: 8192", "max_tokens: 99999")
    assert fits(40)["sft"][2] == "no: lower sft.max_tokens"


def room(*, gpus: int = 0) -> dict[str, float]:
    """What each disk, and the host's memory, must have free, in GB."""
    params = load_params()
    shape = check.find_shape(params)
    assert shape
    devices = [memory.Device("GPU", True, 2**36, 2**36)] * gpus or [memory.cpu_device(1)]
    return {what: need / 1e9 for what, need, _ in check.needed_room(params, shape, devices)}


def test_too_little_room_ends_in_an_error(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After everything else was shown; and not where another machine is asked about."""
    use_abel(workplace)
    full = shutil.disk_usage(workplace)._replace(free=30 * 10**9)
    monkeypatch.setattr("shutil.disk_usage", lambda place: full)
    error, text = refusal()
    what = "disk: base model, DVC's copy, training"
    assert re.fullmatch(what + r": 3\d\.\d GB are needed and 30\.0 GB are free \(docs/.+\)", error)
    assert re.search(what + r" +3\d\.\d GB +30\.0 GB +no", text) and "evaluate, style plain" in text.replace(
        ":", ","
    )
    assert fits(80)


def test_room_for_the_model_is_needed_once_where_dvc_links(workplace: Path) -> None:
    """Not again for what is there already, and never for what other disks hold."""
    use_abel(workplace)
    (copied,) = room().values()
    (workplace / ".dvc").mkdir()
    config = workplace / ".dvc" / "config"
    config.write_text("[cache]\n    type = hardlink,copy\n")
    before = sorted(workplace.rglob("*"))
    (linked,) = room().values()
    assert copied - linked == pytest.approx(14.5, abs=0.1)  # 7.24 thousand million weights of 2 bytes
    assert sorted(workplace.rglob("*")) == before

    half = workplace / ".work" / "base" / "fingerprint" / "piece"
    half.parent.mkdir(parents=True)
    with half.open("wb") as file:
        file.truncate(7 * 10**9)  # a file without content takes no room here
    assert sum(room().values()) == pytest.approx(linked - 7)

    elsewhere = Path("/dev/shm")
    if elsewhere.stat().st_dev != workplace.stat().st_dev:  # no hard link leads there
        config.write_text(f"[cache]\n    type = hardlink,copy\n    dir = {elsewhere}/none/cache\n")
        assert list(room()) == ["disk: base model, training", "disk: DVC's copy"]

    save_base(workplace, None)
    assert list(room()) == ["disk: training"]


def test_each_gpu_needs_the_model_in_the_hosts_memory_once(workplace: Path) -> None:
    """It is loaded there first, by every process."""
    use_abel(workplace)
    assert room(gpus=8)["memory: base model, on its way to each GPU"] == pytest.approx(8 * 14.5, abs=0.5)


def test_unknown_before_download(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub model's shape is in its config, and there is no guessing it."""
    use_abel(workplace)
    monkeypatch.setenv("HF_HUB_CACHE", str(workplace / "cache"))
    hub = f"model:\n  source: hub\n  id: nobody/nothing\n  revision: {'a' * 40}\n  dtype: bfloat16\n"
    change(workplace, HUB, hub)
    text = output()
    assert "known once the model's config is here: `dvc repro base`" in text
    assert "rows at once" not in text and "room for" not in text

    # Once `base` ran, its config says it; the profile's precision counts.
    folder = workplace / "checkpoints" / "base"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(ABEL))
    manifest = {"params": {"model": load_params().model_dump(mode="json")["model"]}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert fits(80)["sft"][1:] == ["8 rows x 2 passes = 16", "yes"]
