"""Typed parameters: `params.yaml` (what this run is) and `profiles/<profile>.yaml` (what depends on the model).

Every key is checked before any work starts. A mistake is one line with its place:

    profiles/tiny.yaml:41: dpo.learning_rate: input should be a valid number (found 'fast')
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML, YAMLError

from stages.run.errors import UserError
from stages.run.paths import PARAMS, PROFILES

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Temperature = Annotated[float, Field(gt=0, le=5)]
TopP = Annotated[float, Field(gt=0, le=1)]
Changed = Literal[
    "one", "all", "none"
]  # twins of a Platinum question: one, one for each of its numbers, none
Revision = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]  # a full commit hash, so that it cannot move


class Section(BaseModel):
    """A group of keys: unknown keys and wrong types are refused, values never change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


# ---- params.yaml -------------------------------------------------------------------------------------


class SignalWeights(Section):
    """How much each signal counts in s_wm."""

    s_end: NonNegative
    s_path: NonNegative
    s_cf: NonNegative

    @model_validator(mode="after")
    def _some_weight(self) -> Self:
        if self.s_end + self.s_path + self.s_cf <= 0:
            raise ValueError("at least one weight must be above 0")
        return self


class Reward(Section):
    """The terms of a trajectory's reward; the formula is in stages/regime_w/reward.py."""

    alpha: NonNegative
    beta: NonNegative
    kappa: NonNegative
    gamma: NonNegative
    consensus: Share
    length_penalty: NonNegative
    length_limit: Positive


class RegimeW(Section):
    """The coherence score and the reward made from it."""

    scorer: str
    weights: SignalWeights
    vote: Literal["s_end", "s_path", "s_cf", "s_wm", "reach", "logprob", "both", "all"]
    reward: Reward
    suspect_from: Share


class PreferenceKind(Section):
    """Limits for one kind of pair; `per_question: 0` turns the kind off."""

    per_question: Count
    per_trajectory: Positive
    min_margin: NonNegative


class Preference(Section):
    """Which pairs are made."""

    correctness: PreferenceKind
    coherence: PreferenceKind
    sound_only: bool
    drop_suspects: bool
    length_balance: bool

    @model_validator(mode="after")
    def _some_kind(self) -> Self:
        if not self.correctness.per_question and not self.coherence.per_question:
            raise ValueError(
                "correctness.per_question and coherence.per_question are both 0: no pair could be made"
            )
        return self


class Own(Section):
    """Files of the user's own. They are named here, because DVC fills dvc.yaml from params.yaml and from no profile."""

    train: str
    platinum: str
    model: str


class Headline(Section):
    """Which policy's metrics are copied to metrics/headline.json."""

    policy: Literal["base", "sft", "dpo"]


# ---- profiles/<profile>.yaml -------------------------------------------------------------------------


class Corpus(Section):
    """The text a built base model is trained on, and how."""

    problems: Positive
    prompts: dict[Literal["plain", "changes", "short", "adding"], str]
    shares: dict[Literal["plain", "changes", "short", "adding"], Share]
    confused_share: Share
    other_share: Share
    slip_share: Share
    batch: Positive
    learning_rate: Rate
    warmup_steps: Count


class Architecture(Section):
    """A Mistral-shaped model, and the size of its tokenizer."""

    vocab: Annotated[int, Field(ge=300)]
    hidden: Positive
    layers: Positive
    heads: Positive
    kv_heads: Positive
    ffn: Positive
    context: Positive

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise ValueError(
                f"hidden ({self.hidden}) must be a multiple of heads ({self.heads}), "
                f"and heads of kv_heads ({self.kv_heads})"
            )
        return self


class ShippedModel(Section):
    """The small model that lies in this repository, in `stages/tiny/base/`."""

    source: Literal["shipped"]


class BuiltModel(Section):
    """A small model trained from scratch, as the shipped one was."""

    source: Literal["build"]
    seed: Count
    architecture: Architecture
    corpus: Corpus


class HubModel(Section):
    """A model from the hub at a pinned revision."""

    source: Literal["hub"]
    id: str
    revision: Revision
    dtype: Literal["bfloat16", "float32"]
    overrides: dict[str, Any] = {}


class DirectoryModel(Section):
    """A model in a folder, laid out as on the hub; `path` is `own.model` in params.yaml."""

    source: Literal["directory"]
    path: str
    dtype: Literal["bfloat16", "float32"]
    overrides: dict[str, Any] = {}


class GeneratedData(Section):
    """Problems made by the generator; `wrong_labels` of the training answers are wrong on purpose."""

    source: Literal["generated"]
    train: Positive
    valid: Positive
    platinum: Positive
    changed: Changed
    wrong_labels: Share


class HubDataset(Section):
    """One split of a dataset on the hub."""

    id: str
    config: str
    split: str
    revision: Revision


class HubData(Section):
    """Train and Platinum from the hub; validation is taken out of train."""

    source: Literal["hub"]
    train: HubDataset
    platinum: HubDataset
    changed: Changed
    valid: Positive


class FilesData(Section):
    """Train and Platinum from files (`question`, `answer`), `own.train` and `own.platinum` in params.yaml.

    Validation is taken out of train.
    """

    source: Literal["files"]
    train: str
    platinum: str
    changed: Changed
    valid: Positive


class Prompt(Section):
    """How a question is put to the model, and how a gold solution is written as its answer.

    `opening` is what the chat template has already written of the answer, such as R1's "<think>\\n". All
    recorded completions begin with it, so that whoever reads one sees that it began as a thought.
    """

    chat: bool
    system: str | None = None
    opening: str = ""
    default: str
    styles: dict[str, str]
    completion: str

    @model_validator(mode="after")
    def _placeholders(self) -> Self:
        if self.default not in self.styles:
            raise ValueError(f"default: style '{self.default}' is not in styles ({', '.join(self.styles)})")
        for name, template in self.styles.items():
            if template.count("{question}") != 1:
                raise ValueError(f"styles.{name}: must hold {{question}} exactly once")
        parts = all(key in self.completion for key in ("{steps}", "{answer}"))
        if not parts and "{solution}" not in self.completion:
            raise ValueError("completion: must hold {solution}, or {steps} and {answer}")
        if self.system and not self.chat:
            raise ValueError("system: a system line needs chat: true")
        if self.opening and not self.chat:
            raise ValueError("opening: only a chat template can open the answer; it needs chat: true")
        if not self.completion.startswith(self.opening):
            raise ValueError(f"completion: must begin with opening ({self.opening!r})")
        return self


class Lora(Section):
    """The adapter."""

    r: Positive
    alpha: Positive
    dropout: Share


class Sft(Section):
    """Supervised fine-tuning. `batch` is global, over all devices."""

    examples: Positive | None
    styles: list[str]
    epochs: Positive
    batch: Positive
    learning_rate: Rate
    warmup_ratio: Share
    max_tokens: Positive
    checkpoint_steps: Positive
    lora: Lora


class Arm(Section):
    """One way to ask."""

    style: str
    temperature: Temperature
    top_p: TopP
    system: str | None = None


class Rollout(Section):
    """Trajectories drawn from the SFT policy: `per_question` pulls spread over the arms."""

    questions: Positive | None
    per_question: Annotated[int, Field(ge=2)]
    allocation: Literal["uniform", "thompson"]
    round_questions: Positive
    floor: Share
    max_new_tokens: Positive
    arms: dict[str, Arm]

    @model_validator(mode="after")
    def _enough_arms(self) -> Self:
        if len(self.arms) < 2:
            raise ValueError("arms: at least two are needed")
        if self.allocation == "uniform" and self.per_question != len(self.arms):
            raise ValueError(
                f"per_question: {self.per_question} trajectories wanted and {len(self.arms)} arms given; "
                "uniform allocation pulls every arm once, so make them equal (or use allocation: thompson)"
            )
        return self


class Dpo(Section):
    """Direct preference optimisation. `batch` is global, over all devices."""

    beta: Rate
    loss_type: list[Literal["sigmoid", "sigmoid_norm", "ipo", "sft"]]
    loss_weights: list[NonNegative]
    epochs: Positive
    batch: Positive
    learning_rate: Rate
    warmup_ratio: Share
    max_tokens: Positive
    checkpoint_steps: Positive
    select_steps: Positive
    select_questions: Positive
    select_samples: Count
    select_max_new_tokens: Positive

    @model_validator(mode="after")
    def _weights_match(self) -> Self:
        if len(self.loss_type) != len(self.loss_weights):
            raise ValueError("loss_weights: give one weight for each loss_type")
        if len(set(self.loss_type)) != len(self.loss_type):
            raise ValueError("loss_type: names a loss twice")
        if not any(self.loss_weights):
            raise ValueError("loss_weights: at least one must be above 0, or nothing is learned")
        if self.select_steps % self.checkpoint_steps:
            raise ValueError(
                "select_steps: must be a multiple of checkpoint_steps, so that a resumed run selects alike"
            )
        return self


class Evaluate(Section):
    """Greedy decoding once, and `samples` draws at `temperature` and `top_p`."""

    max_new_tokens: Positive
    samples: Count
    temperature: Temperature
    top_p: TopP


Auto = Literal["auto"]


class Hardware(Section):
    """What may differ between machines without changing what is computed; no stage depends on it."""

    threads: Positive | None
    processes: Positive | Auto
    engine: Literal["auto", "transformers", "vllm"]
    generation_batch: Positive | Auto
    per_device_batch: Positive | Auto
    gradient_checkpointing: bool | Auto
    seconds: dict[str, Rate] = {}  # what each stage took somewhere, to say how long a first run will take


class Params(Section):
    """All sections; a stage is given only those it declares."""

    profile: str
    seed: Count
    regime_w: RegimeW
    preference: Preference
    headline: Headline
    own: Own
    model: Annotated[ShippedModel | BuiltModel | HubModel | DirectoryModel, Field(discriminator="source")]
    data: Annotated[GeneratedData | HubData | FilesData, Field(discriminator="source")]
    prompt: Prompt
    sft: Sft
    rollout: Rollout
    dpo: Dpo
    evaluate: Evaluate
    hardware: Hardware

    @model_validator(mode="after")
    def _styles_exist(self) -> Self:
        known = self.prompt.styles
        wanted = [(f"rollout.arms.{name}.style", arm.style) for name, arm in self.rollout.arms.items()]
        wanted += [("sft.styles", style) for style in self.sft.styles]
        for key, style in wanted:
            if style not in known:
                raise ValueError(f"{key}: style '{style}' is not in prompt.styles ({', '.join(known)})")
        for name, arm in self.rollout.arms.items():
            if arm.system and not self.prompt.chat:
                raise ValueError(f"rollout.arms.{name}.system: a system line needs prompt.chat: true")
        return self


RUN_SECTIONS = ("profile", "seed", "regime_w", "preference", "headline", "own")
# What a profile leaves to params.yaml: section and source in the profile, the section's key, the key in `own`.
OWN = (
    ("data", "files", "train", "train"),
    ("data", "files", "platinum", "platinum"),
    ("model", "directory", "path", "model"),
)


class Sections:
    """The declared sections of the parameters, as attributes; any other name is a programming error.

    `regime_w.vote` declares one key of a section: the section can be read, and only the key is recorded.
    """

    def __init__(self, params: Params, names: tuple[str, ...]) -> None:
        self._params = params
        self.declared = names

    def __getattr__(self, name: str) -> Any:
        if name not in (*(section.partition(".")[0] for section in self.declared), "hardware", "profile"):
            raise AttributeError(f"section '{name}' was not declared by this stage")
        return getattr(self._params, name)

    def read(self) -> dict[str, Any]:
        """The declared values that may change results, as plain data for manifest and fingerprint."""
        data = self._params.model_dump(mode="json")
        values: dict[str, Any] = {}
        for name in self.declared:
            section, _, key = name.partition(".")
            if key:
                values.setdefault(section, {})[key] = data[section][key]
            else:
                values[section] = data[section]
        return values


def load_params(root: Path = Path()) -> Params:
    """Read and check `params.yaml` and its profile under `root`. Raises UserError with file, line and key."""
    run = _File(root, PARAMS)
    for key in run.values:
        if key not in RUN_SECTIONS:
            words = f"unknown key '{key}'; params.yaml holds {', '.join(RUN_SECTIONS)}"
            raise run.error((key,), f"{words}, and what depends on the model is in profiles/")
    profile = run.values.get("profile")
    profiles = sorted(path.stem for path in (root / PROFILES).glob("*.yaml"))
    if profile not in profiles:
        words = f"profile: '{profile}' is unknown; choose one of {', '.join(profiles)}"
        raise run.error(("profile",), words)
    model = _File(root, PROFILES / f"{profile}.yaml")
    for key in model.values:
        if key in RUN_SECTIONS:
            raise model.error((key,), f"'{key}' belongs in params.yaml")
    own = run.values.get("own")
    for section, source, key, name in OWN:
        values = model.values.get(section)
        if not isinstance(values, dict) or values.get("source") != source:
            continue
        if key in values:
            words = f"name it in {PARAMS}, as own.{name}, so that DVC sees when it changes"
            raise model.error((section, key), f"{section}.{key}: {words}")
        values[key] = own.get(name) if isinstance(own, dict) else None  # None: `own` itself is refused below
    try:
        return Params.model_validate(run.values | model.values)
    except ValidationError as error:
        path, message = _explain(error.errors()[0])
        others = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        file = run if path and path[0] in RUN_SECTIONS else model
        raise file.error(path, f"{'.'.join(map(str, path))}: {message}{others}") from None


def _explain(error: Any) -> tuple[tuple[Any, ...], str]:
    """The path of the key to change, and what is wrong with it, from one of pydantic's errors."""
    path, kind = error["loc"], error["type"]
    if path[:1] in (("model",), ("data",)):
        path = path[:1] + path[2:]  # pydantic puts the chosen `source` in between
    if kind == "value_error":  # a check over several keys begins with the one to change
        named = re.match(r"([\w.-]+): (.*)", str(error["ctx"]["error"]), re.DOTALL)
        return ((*path, *named[1].split(".")), named[2]) if named else (path, str(error["ctx"]["error"]))
    if kind == "union_tag_invalid":
        found = error["ctx"]
        return (*path, "source"), f"'{found['tag']}' is unknown; choose one of {found['expected_tags']}"
    if kind in ("missing", "union_tag_not_found"):
        return ((*path, "source") if kind != "missing" else path), "is missing"
    if kind == "extra_forbidden":
        return path, "unknown key; check its spelling"
    return path, f"{error['msg'][:1].lower()}{error['msg'][1:]} (found {error['input']!r:.80})"


class _File:
    """A parameter file: its plain values (YAML 1.2, as DVC reads them, so that 5e-6 is a number), and their lines."""

    def __init__(self, root: Path, name: Path) -> None:
        self.name, path = name.as_posix(), root / name
        try:
            text = path.read_text(encoding="utf-8")
            self.tree = YAML(typ="rt").load(text)
            self.values: dict[str, Any] = YAML(typ="safe", pure=True).load(text)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from None
        except YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark else ""
            raise UserError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', error)})") from None
        if not isinstance(self.values, dict):
            raise UserError(f"{path}: must hold keys and values")

    def error(self, path: tuple[Any, ...], message: str) -> UserError:
        """An error at the line of the deepest key of `path` that exists."""
        line, tree = 1, self.tree
        for part in path:
            try:
                line = (tree.lc.key if hasattr(tree, "keys") else tree.lc.item)(part)[0] + 1
                tree = tree[part]
            except (KeyError, IndexError, AttributeError, TypeError):
                break
        return UserError(f"{self.name}:{line}: {message}")
