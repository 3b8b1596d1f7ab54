"""Every key is checked before any work, and a mistake is one line with file, line and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.run.errors import UserError
from stages.run.params import BuiltModel, FileTest, GeneratedData, Sections, load_params

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


def test_a_test_sets_path_counts_from_own_tests(tmp_path: Path) -> None:
    """Several columns may hold the question."""
    sets = "tests:\n    a: {source: file, file: b/a.csv, question: [Body, Question]}"
    params = load_params(write(tmp_path, profile=change(PROFILE, "changed: one", f"changed: one\n  {sets}")))
    test = params.data.tests["a"]
    assert isinstance(test, FileTest)
    assert (test.path, test.question, test.answer) == ("tests/b/a.csv", ["Body", "Question"], "answer")


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
        "data.train.revision: must be a commit's whole hash, 40 digits from 0 to f, because a branch moves",
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
        ("select: {steps: 20", "select: {steps: 15"),
        "  select: {steps: 15",
        "dpo.select.steps: ",
    ),
    "a run's section": (("data:\n", "seed: 4\ndata:\n"), "seed:", "'seed' belongs in params.yaml"),
    "a test set's bad name": (
        ("wrong_labels: 0.1", "wrong_labels: 0.1\n  tests:\n    my set: {source: file, file: a.jsonl}"),
        "    my set:",
        "data.tests.my set: a test set's name begins with a letter or digit",
    ),
    "a test set named as a file": (
        ("wrong_labels: 0.1", "wrong_labels: 0.1\n  tests:\n    platinum: {source: file, file: a.jsonl}"),
        "    platinum:",
        "data.tests.platinum: data/gsm8k/platinum.jsonl has this name; choose another one",
    ),
    "two test sets of one name": (
        ("wrong_labels: 0.1", "wrong_labels: 0.1\n  tests:\n    a: {source: file, file: a.jsonl}\n    a: 5"),
        "    a: 5",
        "not valid YAML",
    ),
    "a test set's unknown source": (
        ("wrong_labels: 0.1", "wrong_labels: 0.1\n  tests:\n    a: {source: files, file: a.jsonl}"),
        "    a:",
        "data.tests.a.source: 'files' is unknown; choose one of 'hub', 'file', 'generated'",
    ),
    "a test set's unknown key": (
        ("wrong_labels: 0.1", "wrong_labels: 0.1\n  tests:\n    a: {source: file, file: a.jsonl, gold: x}"),
        "    a:",
        "data.tests.a.gold: unknown key",
    ),
    "a test set's revision that can move": (
        (
            "wrong_labels: 0.1",
            "wrong_labels: 0.1\n  tests:\n    a: {source: hub, id: b/c, config: d, split: test, revision: main}",
        ),
        "    a:",
        "data.tests.a.revision: ",
    ),
    "a test set outside its folder": (
        ("wrong_labels: 0.1", "wrong_labels: 0.1\n  tests:\n    a: {source: file, file: ../a.jsonl}"),
        "    a:",
        "data.tests.a.file: must lie in the folder that own.tests names in params.yaml",
    ),
    "a range that ends before it begins": (
        (
            "wrong_labels: 0.1",
            "wrong_labels: 0.1\n  tests:\n    a: {source: generated, start: [50, 40], questions: 9}",
        ),
        "    a:",
        "data.tests.a.start: the range begins at 50 and ends below it, at 40",
    ),
    "the same key twice": (("  epochs: 1\n", "  epochs: 1\n  epochs: 2\n"), "  epochs: 2", "not valid YAML"),
}


@pytest.mark.parametrize("name", PROFILE_MISTAKES)
def test_mistake_in_profile(tmp_path: Path, name: str) -> None:
    """Unknown keys, wrong types and impossible combinations name file, line and key."""
    pairs, line, words = PROFILE_MISTAKES[name]
    profile = change(PROFILE, *pairs)
    message = refusal(write(tmp_path, profile=profile))
    assert message.startswith("profiles/small.yaml:") or words == "not valid YAML"
    assert words in message
    if line:
        assert f"profiles/small.yaml:{line_of(profile, line)}: " in message


SFT_LORA = "checkpoints/sft_lora"
ROUND = "  {}: {{start: {}, rollout: {{}}, preference: {{}}, dpo: {{}}}}\n"
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
        "headline.policy: choose one of base, sft, dpo (found 'rl')",
    ),
    "no last round": (
        ("  dpo: {start", "  round1: {start"),
        "rounds:",
        "rounds.dpo: is missing; the last round is called so",
    ),
    "name of another policy": (
        ("  dpo: {start", ROUND.format("sft", SFT_LORA) + "  dpo: {start"),
        "  sft: {start",
        "rounds.sft: is the name of another policy",
    ),
    "name that is no file name": (
        ("  dpo: {start", "  a/b: {start"),
        "  a/b:",
        "rounds.a/b: a name must be letters, digits, - and _",
    ),
    "start that nothing makes": (
        ("start: checkpoints/sft_lora", "start: checkpoints/sft"),
        "  dpo: {start",
        "rounds.dpo.start: no adapter of this run; choose one of checkpoints/dpo_coherence_lora/dpo, checkpoints/sft",
    ),
    "circle": (
        ("start: checkpoints/sft_lora", "start: checkpoints/dpo_coherence_lora/dpo"),
        "  dpo: {start",
        "rounds.dpo.start: a circle",
    ),
    "round beside the chain": (
        ("  dpo: {start", ROUND.format("round1", SFT_LORA) + "  dpo: {start"),
        "  round1: {start",
        "rounds.round1: no other round starts from it",
    ),
    "policies that are not the rounds": (
        ("dpo: checkpoints/dpo_coherence_lora/dpo}", "dpo: checkpoints/dpo}"),
        "policies:",
        "policies.dpo: must be checkpoints/dpo_coherence_lora/dpo, as rounds go (found 'checkpoints/dpo')",
    ),
    "own value that does not fit": (
        ("preference: {}, dpo: {}", "preference: {}, dpo: {beta: -1}"),
        "  dpo: {start",
        "rounds.dpo.dpo.beta: input should be greater than 0",
    ),
    "style of a round": (
        ("rollout: {}", "rollout: {arms: {one: {style: other}}}"),
        "  dpo: {start",
        "rounds.dpo.rollout.arms.one.style: style 'other' is not in prompt.styles",
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


def test_a_round_has_values_of_its_own(tmp_path: Path) -> None:
    """They count for this round alone, wherever it stands in the map, and both are recorded."""
    first = "checkpoints/dpo_coherence_lora/round1"
    own = "rollout: {questions: 7, arms: {two: {temperature: 0.5}}}, preference: {}, dpo: {beta: 0.5}"
    run = change(
        RUN,
        ROUND.format("dpo", SFT_LORA),
        f"  dpo: {{start: {first}, {own}}}\n" + ROUND.format("round1", SFT_LORA),
        "sft: checkpoints/sft_lora,",
        f"sft: checkpoints/sft_lora, round1: {first},",
    )
    params = load_params(write(tmp_path, run=run))
    assert params.policy_names == ("base", "sft", "round1", "dpo")
    assert params.chain == {"round1": "sft", "dpo": "round1"}
    names = ("dpo", "rollout", "rounds.${key}.dpo", "rounds.${key}.rollout")
    one, two = (Sections(params, names, name) for name in ("round1", "dpo"))
    assert (one.dpo.beta, two.dpo.beta) == (0.1, 0.5)
    assert (one.rollout.arms["two"].temperature, two.rollout.arms["two"].temperature) == (1.0, 0.5)
    assert two.rollout.arms["two"].top_p == 0.9
    assert [spec.questions for spec in two.so_far("rollout")] == [10, 7]
    assert (one.later, two.later) == ("", "dpo")
    read = two.read()
    assert read["dpo"]["beta"] == 0.1 and read["rounds"]["dpo"]["dpo"] == {"beta": 0.5}
    assert "round1" not in read["rounds"]
