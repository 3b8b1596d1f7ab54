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

from stages.run.errors import UserError
from stages.run.files import read_json, sha256_file
from stages.run.paths import (
    BASE,
    DPO_ADAPTER,
    LOCK,
    PAIRS,
    PLATINUM_EVAL,
    PROBLEMS,
    ROLLOUTS,
    SCORED,
    SFT_ADAPTER,
)
from stages.run.stage import MANIFEST, manifest_path

# The output beside which a stage's manifest lies; the last stage comes first.
MADE_BY: dict[str, Path] = {
    **{f"evaluate@{policy}": PLATINUM_EVAL / f"{policy}.jsonl" for policy in ("dpo", "sft", "base")},
    "dpo": DPO_ADAPTER,
    "preference": PAIRS,
    "coherence": SCORED,
    "rollout": ROLLOUTS,
    "sft": SFT_ADAPTER,
    "base": BASE,
    "prepare": PROBLEMS,
}
TRAINING = tuple(name for name in MADE_BY if not name.startswith("evaluate@"))

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

    def link(self, role: str, path: Path | str) -> Link | None:
        """The link to one path."""
        name = path if isinstance(path, str) else path.as_posix()
        return next((one for one in self.links if (one.role, one.path) == (role, name)), None)


class History:
    """The run in the current folder, from its manifests and dvc.lock. Each file is hashed once.

    Raises UserError when a manifest or dvc.lock is damaged.
    """

    def __init__(self) -> None:
        self._lock = read_lock()
        self._hashes: dict[tuple[str, str], str | None] = {}
        self._manifests: dict[str, Manifest | None] = {}

    def steps(self, stages: Sequence[str]) -> list[Step]:
        """The stages that have run, each checked."""
        return [step for stage in stages if (step := self.step(stage))]

    def step(self, stage: str) -> Step | None:
        """One stage, checked; None when neither a manifest nor dvc.lock has it."""
        output, locked = MADE_BY[stage], self._lock.get(stage, {})
        manifest = self.manifest(stage)
        files = [name for name in locked.get("params", {}) if name.startswith("profiles/")]
        profile = Path(files[0]).stem if files else None
        if manifest is None:
            if not locked:
                return None
            params = {key: value for file in locked.get("params", {}).values() for key, value in file.items()}
            md5 = _md5_of(locked.get("outs", []), output.as_posix())
            return Step(
                stage,
                LOCK.name,
                output,
                md5 and f"md5:{md5}",
                profile,
                params,
                list(self._locked_links(stage)),
            )
        path = manifest_path(output).as_posix()
        identity = self._hash(path) if output.is_dir() else manifest.outputs.get(output.as_posix())
        step = Step(stage, "manifest", output, identity, profile, manifest.params)
        if md5 := _md5_of(locked.get("outs", []), path):  # a manifest in a folder has no sum of its own there
            state = AS_RECORDED if self._hash(path, "md5") == md5 else DIFFERS
            step.links.append(Link(stage, "locked", path, f"md5:{md5}", state))
        for name, recorded in manifest.outputs.items():
            step.links.append(Link(stage, "wrote", name, recorded, self._state(name, recorded)))
        for name, recorded in manifest.inputs.items():
            state = self._state(name, recorded)
            if state == UNCHECKED and (made := self._recorded_by_maker(name)):
                state = ALIKE if made == recorded else UNLIKE
            elif state == UNCHECKED:
                state = self._state_in_lock(stage, name)
            step.links.append(Link(stage, "read", name, recorded, state))
        return step

    def manifest(self, stage: str) -> Manifest | None:
        """The manifest of a stage, if it is here."""
        if stage not in self._manifests:
            path = manifest_path(MADE_BY[stage])
            self._manifests[stage] = _read_manifest(path) if path.is_file() else None
        return self._manifests[stage]

    def _state(self, path: str, recorded: str) -> str:
        actual = self._hash(path)
        return UNCHECKED if actual is None else AS_RECORDED if actual == recorded else DIFFERS

    def _hash(self, path: str, kind: str = "sha256") -> str | None:
        """The hash of a file, or of a folder's manifest; None when it is not here."""
        if (path, kind) not in self._hashes:
            file = Path(path) / MANIFEST if Path(path).is_dir() else Path(path)
            self._hashes[path, kind] = _digest(file, kind) if file.is_file() else None
        return self._hashes[path, kind]

    def _recorded_by_maker(self, path: str) -> str | None:
        """The hash of a file that the stage which wrote it recorded."""
        made = (self.manifest(stage) for stage in MADE_BY)
        return next((one.outputs[path] for one in made if one and path in one.outputs), None)

    def _locked_links(self, stage: str) -> Iterator[Link]:
        """The data that a stage read and wrote according to dvc.lock, when its manifest is not here."""
        entry = self._lock[stage]
        for out in entry.get("outs", []):
            state = self._state_by_md5(out["path"], out["md5"])
            yield Link(stage, "wrote", out["path"], f"md5:{out['md5']}", state)
        for dep in entry.get("deps", []):
            if dep["path"].startswith(("data/", "checkpoints/")):
                state = self._state_by_md5(dep["path"], dep["md5"])
                if state == UNCHECKED:
                    state = self._state_in_lock(stage, dep["path"])
                yield Link(stage, "read", dep["path"], f"md5:{dep['md5']}", state)

    def _state_by_md5(self, path: str, recorded: str) -> str:
        if recorded.endswith(".dir") or not Path(path).is_file():  # DVC hashes a folder in its own way
            return UNCHECKED
        return AS_RECORDED if self._hash(path, "md5") == recorded else DIFFERS

    def _state_in_lock(self, stage: str, path: str) -> str:
        """Whether dvc.lock has the same md5 for a path at the stage that wrote it and at `stage`, which read it."""
        read = _md5_of(self._lock.get(stage, {}).get("deps", []), path)
        made = (_md5_of(entry.get("outs", []), path) for entry in self._lock.values())
        written = next(filter(None, made), None)
        if read is None or written is None:
            return UNCHECKED
        return ALIKE if read == written else UNLIKE


def broken(steps: Sequence[Step]) -> list[Link]:
    """The links that do not hold."""
    return [link for step in steps for link in step.links if link.broken]


def settings(stage: str, params: dict[str, Any]) -> Iterator[str]:
    """A stage's own short parameters as "name value", and the seed if it read one."""
    kind = stage.partition("@")[0]
    own = params.get(SECTION.get(kind, kind))
    yield from _flat(own if isinstance(own, dict) else {})
    if "seed" in params:
        yield f"seed {params['seed']}"


def _flat(values: dict[str, Any], above: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            if key not in LONG:
                yield from _flat(value, f"{above}{key}.")
        elif value is not None and value is not False and key not in LONG:
            words = " ".join(map(str, value)) if isinstance(value, list) else _plain(value)
            yield f"{above}{key} {words}"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _read_manifest(path: Path) -> Manifest:
    try:
        return Manifest.model_validate(read_json(path))
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"])) or "it"
        raise UserError(f"{path}: no manifest of this pipeline ({key} is wrong); run `dvc repro`") from None


def read_lock() -> dict[str, Any]:
    """The stages in dvc.lock; none when there is no such file."""
    from ruamel.yaml import YAML, YAMLError

    if not LOCK.is_file():
        return {}
    try:
        stages = YAML(typ="safe", pure=True).load(LOCK.read_text(encoding="utf-8"))["stages"]
        return {str(name): dict(entry) for name, entry in stages.items()}
    except (OSError, UnicodeDecodeError, YAMLError, TypeError, KeyError, ValueError, AttributeError):
        raise UserError(f"{LOCK}: cannot be read; `git checkout {LOCK}` gives the committed one") from None


def _md5_of(entries: Sequence[dict[str, Any]], path: str) -> str | None:
    return next((one.get("md5") for one in entries if one.get("path") == path), None)


def _digest(path: Path, kind: str) -> str:
    try:
        if kind == "sha256":
            return sha256_file(path)
        with path.open("rb") as file:
            return hashlib.file_digest(file, kind).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its owner and rights") from None
