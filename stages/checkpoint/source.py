"""Says where a model's files come from and which of them are needed, and checks that the disk has room for them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from stages.checkpoint import weights
from stages.checkpoint.hub import Repository
from stages.run.errors import UserError
from stages.run.stage import StageRun

# The files of a config, a tokenizer and a chat template. Code and left-overs of training are never fetched.
SMALL_FILES = (
    r"(config|generation_config|added_tokens|special_tokens_map|vocab|chat_template)\.json|tokenizer.*\.json|"
    r".*\.(model|jinja)|(merges|vocab)\.txt|(model\.safetensors|pytorch_model\.bin)\.index\.json"
)


GB = 1_000_000_000


class Folder:
    """A model in a folder on this machine. It offers what `Repository` offers."""

    trouble: UserError | None = None

    def __init__(self, folder: Path) -> None:
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{folder}: has no config.json; own.model must be a folder laid out as on the hub"
            )
        self.folder = folder

    @property
    def names(self) -> list[str]:
        """The files in the folder."""
        return sorted(path.name for path in self.folder.iterdir() if path.is_file())

    def missing_bytes(self, names: Iterable[str]) -> int:
        """Nothing is downloaded."""
        return 0

    def fetch(self, names: Iterable[str], advance: Callable[[int], object]) -> None:
        """Nothing is downloaded. When a file is missing, reading it will say so."""


Source = Repository | Folder


def weight_files(source: Source, expected: weights.Expected, say: Callable[[str], object]) -> list[str]:
    """The files that hold the weights: safetensors rather than pickles, whole ones rather than those of an index.

    An index may be left from other weights: beside a whole file, or when files that it names are not there and other
    weights are. That is said. The index that is taken is compared with the model.
    """
    kinds = (weights.SAFE, weights.SAFE_INDEX, weights.PICKLE, weights.PICKLE_INDEX)
    found: dict[str, dict[str, str]] = {}  # weights -> tensor -> file
    for name in kinds:
        if name in source.names:
            index = name.endswith(".json")
            found[name] = weights.read_index(source.folder / name) if index else {"": name}
    if not found:
        raise source.trouble or UserError(
            f"{source.folder}: has no weights that are read here; wanted is {weights.SAFE} or {weights.PICKLE}, or "
            "their index and the files it names"
        )
    whole = (name for name, files in found.items() if set(files.values()) <= set(source.names))
    chosen = next(whole, next(iter(found)))
    for name, files in found.items():
        gone = sorted(set(files.values()) - set(source.names))
        if (
            name != chosen and gone and not source.trouble
        ):  # without the hub, files are not there for other reasons
            say(f"{name} names {gone[0]}, which is not there; it is left out, and {chosen} is taken")
        elif name == f"{chosen}.index.json":
            say(f"{name} stands beside the whole {chosen}; it is left out, and {chosen} is taken")
    if chosen.endswith(".json"):
        expected.check(map(expected.own, found[chosen]), source.folder / chosen)
    return sorted(set(found[chosen].values()))


def check_room(run: StageRun, source: Source, files: list[str], converting: int) -> None:
    """Raise UserError when the disks have no room for the download and the converted weights that are still missing."""
    downloading = source.missing_bytes(files)
    needs: dict[int, tuple[Path, int]] = {}
    for place, wanted in ((source.folder, downloading), (run.work, max(0, converting))):
        existing = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
        device = existing.stat().st_dev
        needs[device] = (existing, needs.get(device, (existing, 0))[1] + wanted)
    for folder, wanted in needs.values():
        free = shutil.disk_usage(folder).free
        if wanted > free:
            raise UserError(
                f"base: {wanted / GB:.1f} GB are needed on the disk of {folder.resolve()} ({downloading / GB:.1f} to "
                f"download, {max(0, converting) / GB:.1f} to convert) and {free / GB:.1f} are free; make room, or set "
                "HF_HOME to a folder on a larger disk for the download"
            )
