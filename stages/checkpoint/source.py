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
                f"{folder}: has no config.json; model.path must be a folder laid out as on the hub"
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


def weight_files(source: Source, expected: weights.Expected) -> list[str]:
    """The files that hold the weights, safetensors rather than pickles. An index is compared with the model."""
    kinds = (weights.SAFE_INDEX, weights.SAFE, weights.PICKLE_INDEX, weights.PICKLE)
    chosen = next((name for name in kinds if name in source.names), None)
    if chosen is None:
        raise source.trouble or UserError(
            f"{source.folder}: has no weights that are read here; wanted is {weights.SAFE} or {weights.PICKLE}, or "
            "their index and the files it names"
        )
    if not chosen.endswith(".json"):
        return [chosen]
    index = weights.read_index(source.folder / chosen)
    expected.check(index.keys(), source.folder / chosen)
    return sorted(set(index.values()))


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
