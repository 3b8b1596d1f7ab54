"""Every key is checked before any work, and a mistake is one line with file, line and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.run.errors import UserError
from stages.run.params import BuiltModel, GeneratedData, Sections, load_params

SMALL = Path(__file__).resolve().parents[1] / "small"
RUN = (SMALL / "params.yaml").read_text()
PROFILE = (SMALL / "profiles" / "small.yaml").read_text()
EIGHT_WANTED_SEVEN_GIVEN = (
    "  per_question: 2\n",
    "  per_question: 8\n",
    "    one: {style: plain, temperature: 0.8, top_p: 1.0}\n",
    "".join(f"    arm{i}: {{style: plain, temperature: 0.{i}, top_p: 1.0}}\n" for i in range(1, 7)),
)


def write(root: Path, run: str = RUN, profile: str = PROFILE) -> Path:
    (root / "profiles").mkdir(exist_ok=True)
    (root / "params.yaml").write_text(run)
    (root / "profiles" / "small.yaml").write_text(profile)
    return root


def change(text: str, *pairs: str) -> str:
    for old, new in zip(pairs[::2], pairs[1::2], strict=True):
        assert text.count(old) >= 1, old
        text = text.replace(old, new, 1)
    return text


def line_of(text: str, start: str) -> int:
    """The 1-based line that begins with `start`."""
    return next(n for n, line in enumerate(text.splitlines(), 1) if line.startswith(start))


def refusal(root: Path) -> str:
    with pytest.raises(UserError) as error:
        load_params(root)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_right_files_are_read_as_they_stand(tmp_path: Path) -> None:
    """The values arrive typed; 5e-4 is a number, as in DVC."""
    params = load_params(write(tmp_path))
    assert isinstance(params.model, BuiltModel) and isinstance(params.data, GeneratedData)
    assert params.sft.learning_rate == 0.0005
    assert list(params.rollout.arms) == ["one", "two"]


HUB = """source: hub
  train: {id: openai/gsm8k, config: main, split: train, revision: main}
  platinum: {id: madrylab/gsm8k-platinum, config: main, split: test, revision: main}
  changed: one
  valid: 5"""

FILES = "source: files\n  train: a.jsonl\n  changed: one\n  valid: 5"

PROFILE_MISTAKES = {
    "unknown key": (
        ("  epochs: 1\n  batch", "  epoch: 1\n  epochs: 1\n  batch"),
        "  epoch:",
        "sft.epoch: unknown key",
    ),
    "nested key": (("dropout: 0.05}", "dropout: 0.05, rank: 3}"), "  lora:", "sft.lora.rank: unknown key"),
    "wrong type": (
        ("5e-4", "fast"),
        "  learning_rate: fast",
        "sft.learning_rate: input should be a valid number",
    ),
    "a truth value is no number": (("epochs: 1", "epochs: true"), "  epochs: true", "sft.epochs: "),
    "infinite": (("5e-4", ".inf"), "  learning_rate: .inf", "sft.learning_rate: "),
    "out of range": (("top_p: 1.0}", "top_p: 1.5}"), "    one:", "rollout.arms.one.top_p: "),
    "missing": (("  epochs: 1\n", ""), "sft:", "sft.epochs: is missing"),
    "missing section": (("evaluate:\n", "hardware2:\n"), None, "evaluate: is missing"),
    "unknown source": (
        ("generated", "genrated"),
        "  source: genrated",
        "data.source: 'genrated' is unknown; choose",
    ),
    "no source": (("  source: generated\n", ""), "data:", "data.source: is missing"),
    "key of another source": (("  train: 30", "  train: a.jsonl"), "  train:", "data.train: "),
    "a file named in the profile": (
        (
            "source: generated\n  train: 30\n  valid: 5\n  platinum: 20\n  changed: one\n  wrong_labels: 0.1",
            FILES,
        ),
        "  train:",
        "data.train: name it in params.yaml, as own.train, so that DVC sees when it changes",
    ),
    "revision that can move": (
        (
            "source: generated\n  train: 30\n  valid: 5\n  platinum: 20\n  changed: one\n  wrong_labels: 0.1",
            HUB,
        ),
        "  train:",
        "data.train.revision: ",
    ),
    "8 arms wanted and 7 given": (
        EIGHT_WANTED_SEVEN_GIVEN,
        "  per_question: 8",
        "rollout.per_question: 8 trajectories wanted and 7 arms given",
    ),
    "one arm": (
        ("    two: {style: direct, temperature: 1.0, top_p: 0.9}\n", ""),
        "  arms:",
        "rollout.arms: at least two",
    ),
    "an arm's unknown style": (
        ("style: direct", "style: brief"),
        "    two:",
        "rollout.arms.two.style: style 'brief'",
    ),
    "SFT's unknown style": (
        ("examples: 20\n  styles: [plain]", "examples: 20\n  styles: [odd]"),
        "  styles: [odd]",
        "sft.styles: ",
    ),
    "unknown default style": (
        ("default: plain", "default: odd"),
        "  default:",
        "prompt.default: style 'odd'",
    ),
    "template without question": (
        ('"{question}\\n"', '"?"'),
        "    direct:",
        "prompt.styles.direct: must hold {question}",
    ),
    "completion without answer": (("{solution}", "{steps}"), "  completion:", "prompt.completion: must hold"),
    "system line without chat": (
        ("chat: false", "chat: false\n  system: Be brief."),
        "  system:",
        "prompt.system: a system line needs chat",
    ),
    "opening without chat": (
        ("chat: false", 'chat: false\n  opening: "<think>"'),
        "  opening:",
        "prompt.opening: only a chat template can open the answer",
    ),
    "completion that does not go on from the opening": (
        ("chat: false", 'chat: true\n  opening: "<think>"'),
        "  completion:",
        "prompt.completion: must begin with opening ('<think>')",
    ),
    "an arm's system line without chat": (
        ("temperature: 0.8,", "system: Be brief., temperature: 0.8,"),
        "    one:",
        "rollout.arms.one.system: a system line needs prompt.chat",
    ),
    "heads that do not divide": (
        ("heads: 4", "heads: 3"),
        "  architecture:",
        "model.architecture: hidden (128)",
    ),
    "loss weights": (("[1.0, 0.5]", "[1.0]"), "  loss_weights:", "dpo.loss_weights: give one weight"),
    "no weight of a loss": (
        ("[1.0, 0.5]", "[0, 0]"),
        "  loss_weights:",
        "dpo.loss_weights: at least one must be above 0",
    ),
    "selection between checkpoints": (
        ("select_steps: 20", "select_steps: 15"),
        "  select_steps:",
        "dpo.select_steps: ",
    ),
    "a run's section": (("data:\n", "seed: 4\ndata:\n"), "seed:", "'seed' belongs in params.yaml"),
    "the same key twice": (("  epochs: 1\n", "  epochs: 1\n  epochs: 2\n"), "  epochs: 2", "not valid YAML"),
}


@pytest.mark.parametrize("name", PROFILE_MISTAKES)
def test_mistake_in_profile(tmp_path: Path, name: str) -> None:
    """Unknown keys, wrong types and impossible combinations name file, line and key."""
    pairs, line, words = PROFILE_MISTAKES[name]
    profile = change(PROFILE, *pairs)
    message = refusal(write(tmp_path, profile=profile))
    assert message.startswith("profiles/small.yaml:") or name == "the same key twice"
    assert words in message
    if line:
        assert f"profiles/small.yaml:{line_of(profile, line)}: " in message


RUN_MISTAKES = {
    "unknown key": (
        ("kappa: 1.0", "kapa: 1.0, kappa: 1.0"),
        "  reward:",
        "regime_w.reward.kapa: unknown key",
    ),
    "unknown section": (("seed: 3", "seed: 3\ndpo: {}"), "dpo:", "unknown key 'dpo'"),
    "negative seed": (("seed: 3", "seed: -3"), "seed:", "seed: "),
    "unknown profile": (
        ("profile: small", "profile: large"),
        "profile:",
        "'large' is unknown; choose one of small",
    ),
    "weights that sum to nothing": (
        ("s_end: 0.5, s_path: 0.3, s_cf: 0.2", "s_end: 0, s_path: 0, s_cf: 0"),
        "  weights:",
        "regime_w.weights: at least one weight",
    ),
    "no kind of pair": (
        ("{per_question: 4", "{per_question: 0", "{per_question: 1", "{per_question: 0"),
        "preference:",
        "preference: correctness.per_question and coherence.per_question are both 0",
    ),
    "own path that is none": (
        ("train: my.jsonl", "train: 5"),
        "own:",
        "own.train: input should be a valid string",
    ),
    "unknown policy": (
        ("policy: dpo", "policy: rl"),
        "  policy:",
        "headline.policy: input should be 'base', 'sft'",
    ),
}


@pytest.mark.parametrize("name", RUN_MISTAKES)
def test_mistake_in_params_yaml(tmp_path: Path, name: str) -> None:
    """The same for params.yaml."""
    pairs, line, words = RUN_MISTAKES[name]
    run = change(RUN, *pairs)
    message = refusal(write(tmp_path, run=run))
    assert message.startswith(f"params.yaml:{line_of(run, line)}: ")
    assert words in message


def test_all_mistakes_are_counted(tmp_path: Path) -> None:
    """The first one is shown, and how many more there are."""
    message = refusal(write(tmp_path, profile=change(PROFILE, "5e-4", "fast", "beta: 0.1", "beta: -1")))
    assert message.endswith("(and 1 more)")


@pytest.mark.parametrize("text", ["", "- 1\n", "a: [1\n", "just words"])
def test_file_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    """An empty or broken file is one clear line."""
    write(tmp_path)
    (tmp_path / "profiles" / "small.yaml").write_text(text)
    assert "profiles/small.yaml" in refusal(tmp_path)


def test_file_that_is_not_utf8(tmp_path: Path) -> None:
    """A file saved in another encoding is one clear line."""
    write(tmp_path)
    (tmp_path / "params.yaml").write_bytes("profile: tägig\n".encode("latin-1"))
    assert "not UTF-8" in refusal(tmp_path)


def test_missing_params_yaml(tmp_path: Path) -> None:
    """Run in the wrong folder: the file's name is in the message."""
    assert "params.yaml: cannot be read" in refusal(tmp_path)


def test_a_stage_sees_its_own_sections_only(tmp_path: Path) -> None:
    """What a stage reads and did not declare would be missing from dvc.yaml's params."""
    sections = Sections(load_params(write(tmp_path)), ("sft", "seed"))
    assert sections.sft.epochs == 1 and sections.hardware.threads == 1
    with pytest.raises(AttributeError, match="dpo"):
        _ = sections.dpo
    assert list(sections.read()) == ["sft", "seed"]
