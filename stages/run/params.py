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
from stages.run.paths import BASE, PARAMS, PROFILES
from stages.run.rounds import adapter_of, chain, policies_of

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
RoundName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Revision = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]  # a full commit hash, so that it cannot move
TestName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,15}$")
]  # begins ids, heads a table's row


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
    tests: str
    model: str


class Headline(Section):
    """Which policy's metrics are copied to metrics/headline.json."""

    policy: str


class Round(Section):
    """A round of rollouts, pairs and DPO: the adapter it starts from, and what it has of its own in three sections."""

    start: str
    rollout: dict[str, Any]
    preference: dict[str, Any]
    dpo: dict[str, Any]


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


class HubDataset(Section):
    """One split of a dataset on the hub."""

    id: str
    config: str
    split: str
    revision: Revision


class Columns(Section):
    """Where a test set has its questions and golds.

    Several question columns are joined by a space. `skip` is what stands for the gold of questions that have none.
    """

    question: str | Annotated[list[str], Field(min_length=1)] = "question"
    answer: str = "answer"
    skip: str | None = None


class HubTest(HubDataset, Columns):
    """A test set on the hub."""

    source: Literal["hub"]


class FileTest(Columns):
    """A test set in a file; `path` is `file` in the folder `own.tests` of params.yaml."""

    source: Literal["file"]
    file: str
    path: str = ""


class GeneratedTest(Section):
    """Problems made by the generator whose stories start with a number of this range; elsewhere it is 5 to 30."""

    source: Literal["generated"]
    start: Annotated[list[Annotated[int, Field(ge=5, le=60)]], Field(min_length=2, max_length=2)]
    questions: Positive

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.start[0] > self.start[1]:
            raise ValueError(
                f"start: the range begins at {self.start[0]} and ends below it, at {self.start[1]}"
            )
        return self


Test = Annotated[HubTest | FileTest | GeneratedTest, Field(discriminator="source")]


class Data(Section):
    """What every kind of data has."""

    changed: Changed
    tests: dict[TestName, Test] = {}  # the test sets beside Platinum

    @model_validator(mode="after")
    def _names_are_free(self) -> Self:
        for name in ("train", "valid", "platinum", "changed"):
            if name in self.tests:
                raise ValueError(f"tests.{name}: data/gsm8k/{name}.jsonl has this name; choose another one")
        return self


class GeneratedData(Data):
    """Problems made by the generator; `wrong_labels` of the training answers are wrong on purpose."""

    source: Literal["generated"]
    train: Positive
    valid: Positive
    platinum: Positive
    wrong_labels: Share


class HubData(Data):
    """Train and Platinum from the hub; validation is taken out of train."""

    source: Literal["hub"]
    train: HubDataset
    platinum: HubDataset
    valid: Positive


class FilesData(Data):
    """Train and Platinum from files (`question`, `answer`), `own.train` and `own.platinum` in params.yaml.

    Validation is taken out of train.
    """

    source: Literal["files"]
    train: str
    platinum: str
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


class Select(Section):
    """How often a policy in training answers how many validation questions, and when the best step is believed."""

    steps: Positive
    questions: Positive
    samples: Count
    max_new_tokens: Positive
    level: Annotated[float, Field(gt=0, le=1)]


class Looking(Section):
    """A training whose steps are scored on validation."""

    checkpoint_steps: Positive
    select: Select

    @model_validator(mode="after")
    def _looks_at_checkpoints(self) -> Self:
        if self.select.steps % self.checkpoint_steps:
            raise ValueError(
                "select.steps: must be a multiple of checkpoint_steps, so that a resumed run selects alike"
            )
        return self


class Sft(Looking):
    """Supervised fine-tuning. `batch` is global, over all devices."""

    examples: Positive | None
    styles: list[str]
    epochs: Positive
    batch: Positive
    learning_rate: Rate
    warmup_ratio: Share
    max_tokens: Positive
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


class Dpo(Looking):
    """Direct preference optimisation. `batch` is global, over all devices.

    `reference`: the frozen policy that DPO measures against, the one that the round starts from or SFT.
    """

    beta: Rate
    reference: Literal["round", "sft"]
    loss_type: list[Literal["sigmoid", "sigmoid_norm", "ipo", "sft"]]
    loss_weights: list[NonNegative]
    epochs: Positive
    batch: Positive
    learning_rate: Rate
    warmup_ratio: Share
    max_tokens: Positive

    @model_validator(mode="after")
    def _weights_match(self) -> Self:
        if len(self.loss_type) != len(self.loss_weights):
            raise ValueError("loss_weights: give one weight for each loss_type")
        if len(set(self.loss_type)) != len(self.loss_type):
            raise ValueError("loss_type: names a loss twice")
        if not any(self.loss_weights):
            raise ValueError("loss_weights: at least one must be above 0, or nothing is learned")
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
    rounds: dict[RoundName, Round]
    policies: dict[str, str]
    model: Annotated[ShippedModel | BuiltModel | HubModel | DirectoryModel, Field(discriminator="source")]
    data: Annotated[GeneratedData | HubData | FilesData, Field(discriminator="source")]
    prompt: Prompt
    sft: Sft
    rollout: Rollout
    dpo: Dpo
    evaluate: Evaluate
    hardware: Hardware

    @model_validator(mode="after")
    def _rounds_are_a_chain(self) -> Self:
        wanted = {name: (adapter_of(name) or BASE / "manifest.json").as_posix() for name in self.policy_names}
        for name in [*wanted, *self.policies]:
            if name not in wanted:
                raise ValueError(
                    f"policies.{name}: is neither base nor sft nor one of the rounds; take it out"
                )
            if self.policies.get(name) != wanted[name]:
                found = f" (found '{self.policies[name]}')" if name in self.policies else ""
                raise ValueError(f"policies.{name}: must be {wanted[name]}, as rounds go{found}")
        if self.headline.policy not in wanted:
            raise ValueError(
                f"headline.policy: choose one of {', '.join(wanted)} (found '{self.headline.policy}')"
            )
        return self

    @model_validator(mode="after")
    def _rounds_fit_their_sections(self) -> Self:
        for name in self.rounds:
            for section in ("rollout", "preference", "dpo"):
                self.section_of(section, name)
        return self

    @model_validator(mode="after")
    def _styles_exist(self) -> Self:
        known = self.prompt.styles
        for style in self.sft.styles:
            if style not in known:
                raise ValueError(f"sft.styles: style '{style}' is not in prompt.styles ({', '.join(known)})")
        own = {f"rounds.{name}.rollout": self.section_of("rollout", name) for name in self.rounds}
        for place, rollout in ({"rollout": self.rollout} | own).items():
            for name, arm in rollout.arms.items():
                if arm.style not in known:
                    words = f"style '{arm.style}' is not in prompt.styles ({', '.join(known)})"
                    raise ValueError(f"{place}.arms.{name}.style: {words}")
                if arm.system and not self.prompt.chat:
                    raise ValueError(f"{place}.arms.{name}.system: a system line needs prompt.chat: true")
        return self

    @property
    def chain(self) -> dict[str, str]:
        """Each round with the policy that it starts from, the first round first."""
        return chain(self.starts)

    @property
    def starts(self) -> dict[str, str]:
        """Each round with the adapter that it starts from, as params.yaml has it."""
        return {name: one.start for name, one in self.rounds.items()}

    @property
    def policy_names(self) -> tuple[str, ...]:
        """All policies, in the order of the pipeline."""
        return policies_of(self.starts)

    def by_key(self, section: str) -> dict[str, Any]:
        """A section by its key: the one of all rounds, and that of each round which has something of its own."""
        own = {f"rounds.{name}.{section}": self.section_of(section, name) for name in self.chain}
        shared = getattr(self, section)
        return {section: shared} | {key: spec for key, spec in own.items() if spec != shared}

    def section_of(self, section: str, round_name: str) -> Any:
        """A section as one round has it: its own values over those of all rounds.

        Raises ValueError, with the key in front, for a value of its own that does not fit.
        """
        shared, own = getattr(self, section), getattr(self.rounds[round_name], section)
        if not own:
            return shared
        try:
            return type(shared).model_validate(overlay(shared.model_dump(exclude_unset=True), own))
        except ValidationError as error:
            path, message = _explain(error.errors()[0])
            raise ValueError(
                f"{'.'.join(('rounds', round_name, section, *map(str, path)))}: {message}"
            ) from None


def overlay(shared: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`shared` with the values of `own` over it, level by level. A list is one value."""
    both = (
        key for key, value in own.items() if isinstance(value, dict) and isinstance(shared.get(key), dict)
    )
    return {**shared, **own, **{key: overlay(shared[key], own[key]) for key in both}}


RUN_SECTIONS = ("profile", "seed", "regime_w", "preference", "headline", "own", "rounds", "policies")
# What a profile leaves to params.yaml: section and source in the profile, the section's key, the key in `own`.
OWN = (
    ("data", "files", "train", "train"),
    ("data", "files", "platinum", "platinum"),
    ("model", "directory", "path", "model"),
)


class Sections:
    """The declared sections of the parameters, as attributes; any other name is a programming error.

    `regime_w.vote` declares one key of a section: the section can be read, and only the key is recorded.
    `rounds.${key}.dpo`, as in dvc.yaml, declares what one round has of its own in the section `dpo`: the section is
    then read as that round has it, and both are recorded.
    """

    def __init__(self, params: Params, names: tuple[str, ...], round_name: str = "") -> None:
        self._params, self._round = params, round_name
        self.declared = tuple(name.replace("${key}", round_name) for name in names)

    def __getattr__(self, name: str) -> Any:
        if name not in (*(section.partition(".")[0] for section in self.declared), "hardware", "profile"):
            raise AttributeError(f"section '{name}' was not declared by this stage")
        if f"rounds.{self._round}.{name}" in self.declared:
            return self._params.section_of(name, self._round)
        return getattr(self._params, name)

    @property
    def later(self) -> str:
        """The name of the round, if another one came before it. The first round's choices do not depend on its name."""
        return "" if self._round == next(iter(self._params.chain)) else self._round

    def so_far(self, section: str) -> list[Any]:
        """A section as each round of the chain has it, up to this one."""
        names = list(self._params.chain)
        return [self._params.section_of(section, one) for one in names[: names.index(self._round) + 1]]

    def read(self) -> dict[str, Any]:
        """The declared values that may change results, as plain data for manifest and fingerprint."""
        data = self._params.model_dump(mode="json")
        values: dict[str, Any] = {}
        for name in self.declared:
            *above, key = name.split(".")
            source, target = data, values
            for part in above:
                source, target = source[part], target.setdefault(part, {})
            target[key] = source[key]
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
    _place_tests(model, own)
    try:
        return Params.model_validate(run.values | model.values)
    except ValidationError as error:
        path, message = _explain(error.errors()[0])
        others = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        file = run if path and path[0] in RUN_SECTIONS else model
        raise file.error(path, f"{'.'.join(map(str, path))}: {message}{others}") from None


def _place_tests(model: _File, own: Any) -> None:
    """Give each of the profile's test sets that is a file its path. Raises UserError for one outside `own.tests`."""
    data = model.values.get("data")
    tests = data.get("tests") if isinstance(data, dict) else None
    for name, test in tests.items() if isinstance(tests, dict) else ():
        file = test.get("file") if isinstance(test, dict) and test.get("source") == "file" else None
        if not isinstance(file, str) or not isinstance(own, dict) or not isinstance(own.get("tests"), str):
            continue  # refused elsewhere
        if Path(file).is_absolute() or ".." in Path(file).parts:
            words = (
                f"must lie in the folder that own.tests names in {PARAMS}, so that DVC sees when it changes"
            )
            raise model.error(("data", "tests", name, "file"), f"data.tests.{name}.file: {words}")
        test["path"] = (Path(own["tests"]) / file).as_posix()


def _explain(error: Any) -> tuple[tuple[Any, ...], str]:
    """The path of the key to change, and what is wrong with it, from one of pydantic's errors."""
    path, kind = error["loc"], error["type"]
    if path[:1] in (("model",), ("data",)):
        path = path[:1] + path[2:]  # pydantic puts the chosen `source` in between
    if path[:2] == ("data", "tests"):
        if path[3:] == ("[key]",):
            name = "begins with a letter or digit and has at most 14 letters, digits, - and _"
            return path[:3], f"a test set's name {name}"
        path = path[:3] + path[4:]
    if kind == "value_error":  # a check over several keys begins with the one to change
        named = re.match(r"([\w.-]+): (.*)", str(error["ctx"]["error"]), re.DOTALL)
        return ((*path, *named[1].split(".")), named[2]) if named else (path, str(error["ctx"]["error"]))
    if kind == "union_tag_invalid":
        found = error["ctx"]
        return (*path, "source"), f"'{found['tag']}' is unknown; choose one of {found['expected_tags']}"
    if path[-1:] == ("[key]",):
        wrong = (
            "letters, digits, - and _" if kind == "string_pattern_mismatch" else "text, so put it in quotes"
        )
        return path[:-1], f"a name must be {wrong}"
    if kind in ("missing", "union_tag_not_found"):
        return ((*path, "source") if kind != "missing" else path), "is missing"
    if kind == "string_pattern_mismatch":  # a Revision, the only text with a pattern
        found = f"{error['input']!r:.80}"
        return (
            path,
            f"must be a commit's whole hash, 40 digits from 0 to f, because a branch moves (found {found})",
        )
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
