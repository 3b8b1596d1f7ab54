"""Checks where an output came from: compares what the manifests recorded with the files that are here now.

A stage's manifest names the sha256 of every file it read and wrote (for a folder it read: of the manifest inside), so
the manifests form a chain. When a file is not here (not pulled), the hashes recorded by the stage that wrote it and
the stage that read it are compared, or as a last resort the md5 sums in dvc.lock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML, YAMLError

from stages.run.errors import UserError
from stages.run.files import read_json
from stages.run.params import load_params, overlay
from stages.run.paths import (
    BASE,
    LAST_ROUND,
    LOCK,
    PLATINUM_EVAL,
    PROBLEMS,
    SFT_ADAPTER,
    RoundPaths,
)
from stages.run.stage import MANIFEST, manifest_path

# Parameters that are too long for one line.
LONG = ("arms", "corpus", "architecture", "styles", "overrides")
SECTION = {"evaluate": "evaluate", "coherence": "regime_w", "base": "model", "prepare": "data"}

AS_RECORDED = "as recorded"
DIFFERS = "differs from what lies here now"
ALIKE = "not here; its writer and its reader recorded the same hash"
UNLIKE = "not here; its writer and its reader recorded different hashes"
UNCHECKED = "not here, so not checked"
BROKEN = (DIFFERS, UNLIKE)


class Manifest(BaseModel):
    """What a stage wrote beside its outputs (stages/run/stage.py)."""

    stage: str
    params: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, str]


def made_by() -> dict[str, Path]:
    """The output beside which each stage's manifest lies; the last stage comes first."""
    policies = reversed(load_params().policy_names)
    evaluated = {f"evaluate@{policy}": PLATINUM_EVAL / f"{policy}.jsonl" for policy in policies}
    return evaluated | trained_by(LAST_ROUND)


def trained_by(policy: str) -> dict[str, Path]:
    """The same for the stages behind the adapter of SFT or of a round."""
    found: dict[str, Path] = {}
    chain = load_params().chain
    while policy in chain:
        own = RoundPaths(policy)
        found |= {f"dpo@{policy}": own.adapter, f"preference@{policy}": own.pairs}
        found |= {f"coherence@{policy}": own.scored, f"rollout@{policy}": own.rollouts}
        policy = chain[policy]
    return found | {"sft": SFT_ADAPTER, "base": BASE, "prepare": PROBLEMS}


@dataclass(frozen=True)
class Link:
    """One file or folder that a stage read or wrote: its recorded hash, and whether it still holds."""

    stage: str
    role: str  # "read", "wrote", or "locked": the manifest itself, as dvc.lock has it
    path: str
    recorded: str  # sha256, or md5: and DVC's sum where only dvc.lock is left
    state: str

    @property
    def broken(self) -> bool:
        """Whether what was recorded is not what is there."""
        return self.state in BROKEN

    def __str__(self) -> str:
        role = {"wrote": "written by", "locked": "in dvc.lock for"}.get(self.role, "read by")
        return f"{self.path}, {role} {self.stage}, {self.state}"


@dataclass
class Step:
    """One stage as it was run: its parameters and its links. `source` is `manifest` or `dvc.lock`.

    `identity` is the hash by which later stages name its output.
    """

    stage: str
    source: str
    output: Path
    identity: str | None
    profile: str | None
    params: dict[str, Any]
    links: list[Link] = field(default_factory=list)

    def link(self, role: str, path: Path) -> Link | None:
        """The link to one path."""
        return next((one for one in self.links if (one.role, one.path) == (role, path.as_posix())), None)


class History:
    """The run in the current folder, from its manifests and dvc.lock. Each file is hashed once.

    Raises UserError when a manifest or dvc.lock is damaged.
    """

    def __init__(self) -> None:
        self.made_by = made_by()
        self._lock = read_lock()
        self._hashes: dict[tuple[str, str], str | None] = {}
        self._manifests: dict[str, Manifest | None] = {}

    def steps(self, stages: Sequence[str]) -> list[Step]:
        """The stages that have run, each checked."""
        return [step for stage in stages if (step := self.step(stage))]

    def step(self, stage: str) -> Step | None:
        """One stage, checked; None when neither a manifest nor dvc.lock has it."""
        output, locked, manifest = self.made_by[stage], self._lock.get(stage, {}), self.manifest(stage)
        files: dict[str, dict[str, Any]] = locked.get("params", {})
        profile = next((Path(name).stem for name in files if name.startswith("profiles/")), None)
        if manifest:
            path = manifest_path(output).as_posix()
            identity = self._hash(path) if output.is_dir() else manifest.outputs.get(output.as_posix())
            step = Step(stage, "manifest", output, identity, profile, manifest.params)
            wrote, read = manifest.outputs, manifest.inputs
            # dvc.lock has a sum of a manifest that lies beside its file; one in a folder is part of the folder's sum.
            if recorded := self._locked(stage, "outs").get(path):
                step.links.append(Link(stage, "locked", path, recorded, self._state(path, recorded)))
        elif locked:
            wrote = self._locked(stage, "outs")
            read = {
                path: recorded
                for path, recorded in self._locked(stage, "deps").items()
                if path.startswith(("data/", "checkpoints/"))
            }
            params = _nested({key: value for values in files.values() for key, value in values.items()})
            step = Step(stage, LOCK.name, output, wrote.get(output.as_posix()), profile, params)
        else:
            return None
        step.links += [Link(stage, "wrote", *one, self._state(*one)) for one in wrote.items()]
        step.links += [Link(stage, "read", *one, self._state_read(stage, *one)) for one in read.items()]
        return step

    def manifest(self, stage: str) -> Manifest | None:
        """The manifest of a stage, if it is here."""
        if stage not in self._manifests:
            path = manifest_path(self.made_by[stage])
            try:
                found = Manifest.model_validate(read_json(path)) if path.is_file() else None
            except ValidationError as error:
                key = ".".join(map(str, error.errors()[0]["loc"])) or "it"
                words = f"{path}: no manifest of this pipeline ({key} is wrong); run `dvc repro`"
                raise UserError(words) from None
            self._manifests[stage] = found
        return self._manifests[stage]

    def _locked(self, stage: str, kind: str) -> dict[str, str]:
        """The sums that dvc.lock has of what a stage read (`deps`) or wrote (`outs`), as "md5:..."."""
        return {one["path"]: f"md5:{one.get('md5')}" for one in self._lock.get(stage, {}).get(kind, [])}

    def _hash(self, path: str, kind: str = "sha256") -> str | None:
        """The hash of a file, or of a folder's manifest; None when it is not here."""
        if (path, kind) not in self._hashes:
            file = Path(path) / MANIFEST if Path(path).is_dir() else Path(path)
            try:
                with file.open("rb") as data:
                    self._hashes[path, kind] = hashlib.file_digest(data, kind).hexdigest()
            except (FileNotFoundError, NotADirectoryError):
                self._hashes[path, kind] = None
            except OSError as error:
                words = f"{file}: cannot be read ({error.strerror}); check its owner and rights"
                raise UserError(words) from None
        return self._hashes[path, kind]

    def _state(self, path: str, recorded: str) -> str:
        """Whether what lies here has the recorded hash: sha256, or md5 with `md5:` before it."""
        kind, _, wanted = recorded.rpartition(":")
        if wanted.endswith(".dir"):  # DVC hashes a folder in its own way
            return UNCHECKED
        actual = self._hash(path, kind or "sha256")
        return UNCHECKED if actual is None else AS_RECORDED if actual == wanted else DIFFERS

    def _state_read(self, stage: str, path: str, recorded: str) -> str:
        """As `_state`; for what is not here, whether the stage that wrote it recorded the same hash."""
        state = self._state(path, recorded)
        if state != UNCHECKED:
            return state
        makers = filter(None, map(self.manifest, self.made_by))
        written = next((one.outputs[path] for one in makers if path in one.outputs), None)
        if written is None or recorded.startswith("md5:"):
            recorded = self._locked(stage, "deps").get(path, "")
            written = next(
                (outs[path] for one in self._lock if path in (outs := self._locked(one, "outs"))), ""
            )
        if not written or not recorded:
            return UNCHECKED
        return ALIKE if written == recorded else UNLIKE


def broken(steps: Sequence[Step]) -> list[Link]:
    """The links that do not hold."""
    return [link for step in steps for link in step.links if link.broken]


def settings(stage: str, params: dict[str, Any]) -> Iterator[str]:
    """A stage's own short parameters as "name value", those of its round included, and the seed if it read one."""
    kind, _, variant = stage.partition("@")
    yield from _flat(section_of(params, SECTION.get(kind, kind), variant))
    if "seed" in params:
        yield f"seed {params['seed']}"


def section_of(params: Any, section: str, round_name: str) -> dict[str, Any]:
    """A section among recorded parameters, with what the round has of its own; empty where it is none."""
    found = [params.get(section), params]
    for key in ("rounds", round_name, section):
        found[1] = found[1].get(key) if isinstance(found[1], dict) else None
    shared, own = (one if isinstance(one, dict) else {} for one in found)
    return overlay(shared, own)


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    """dvc.lock's dotted keys as sections: {"regime_w.vote": "reach"} -> {"regime_w": {"vote": "reach"}}."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *above, key = name.split(".")
        target = nested
        for part in above:
            target = target.setdefault(part, {})
        target[key] = value
    return nested


def _flat(values: dict[str, Any], above: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            if key not in LONG:
                yield from _flat(value, f"{above}{key}.")
        elif value is not None and value is not False and key not in LONG:
            one = f"{value:g}" if isinstance(value, float) else value
            yield f"{above}{key} {' '.join(map(str, value)) if isinstance(value, list) else one}"


def read_lock() -> dict[str, Any]:
    """The stages in dvc.lock; none when there is no such file."""
    try:
        return parse_lock(LOCK.read_text(encoding="utf-8")) if LOCK.is_file() else {}
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{LOCK}: cannot be read; `git checkout {LOCK}` gives the committed one") from None


def parse_lock(text: str) -> dict[str, Any]:
    """The stages in the text of a dvc.lock."""
    try:
        stages = YAML(typ="safe", pure=True).load(text)["stages"]
        return {str(name): dict(entry) for name, entry in stages.items()}
    except (YAMLError, TypeError, KeyError, ValueError, AttributeError):
        raise UserError(f"{LOCK}: cannot be read; `git checkout {LOCK}` gives the committed one") from None
