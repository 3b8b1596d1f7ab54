"""Make the base model: the shipped one, or one from the hub at a pinned revision, from a folder, or built anew.

In each case `checkpoints/base/` holds safetensors in one precision, the config, and a tokenizer whose pad token differs
from its end token. Small files are fetched and checked first, so that a wrong config, tokenizer or index, or a disk
that is too small, is reported before the weights are downloaded.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.markup import escape

from stages.checkpoint import weights
from stages.checkpoint.hub import Repository
from stages.checkpoint.look import divide, look
from stages.checkpoint.source import Folder, Source, check_room
from stages.checkpoint.weights import MB
from stages.run.files import atomic_folder
from stages.run.params import BuiltModel, DirectoryModel, HubModel, ShippedModel
from stages.run.paths import BASE, SHIPPED
from stages.run.process import fix_arithmetic
from stages.run.stage import StageRun, stage_run
from stages.tiny.model import pretrain


def main() -> None:
    """Make `checkpoints/base/`."""
    with stage_run("base", sections=("model",), inputs=[], outputs=[BASE]) as run:
        spec = run.params.model
        if isinstance(spec, ShippedModel | BuiltModel):
            folder = build(run, spec) if isinstance(spec, BuiltModel) else SHIPPED
            spec = DirectoryModel(source="directory", path=str(folder), dtype="float32")
        from_hub = isinstance(spec, HubModel)
        take(run, spec, Repository(spec, run.say) if from_hub else Folder(Path(spec.path)))


def build(run: StageRun, spec: BuiltModel) -> Path:
    """Train a small model from scratch, as the shipped one was; returns its folder."""
    fix_arithmetic(run.params.hardware.threads, spec.seed)
    folder = run.work / "built"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut off
    with run.progress("pre-training", spec.corpus.problems, "problems") as advance:
        pretrain(spec, folder, advance)
    return folder


def take(run: StageRun, spec: HubModel | DirectoryModel, source: Source) -> None:
    """Fetch a model, check that everything fits together, and write it in the profile's precision."""

    def say(line: str) -> None:
        run.say(escape(line))  # "[PAD]" is a token, not a style

    # The small files first: what is wrong with the config, the tokenizer or the index shows before the download.
    found = look(spec, source, say)
    check_room(run, source, found.files, found.expected.bytes(found.dtype) - weights.finished_bytes(run))

    # Download and convert the weights.
    missing = source.missing_bytes(found.files)
    with in_megabytes(run, "downloading", missing) as advance:
        source.fetch(found.files, advance)
    if missing:
        run.facts["downloaded_mb"] = round(missing / MB)
    pieces = divide(found, source, say)
    converted = weights.convert(run, source.folder, pieces, found.expected, found.dtype)

    # Write the checkpoint.
    with atomic_folder(BASE) as folder:
        found.model.config.save_pretrained(folder)
        found.model.generation_config.save_pretrained(folder)
        found.tokenizer.save_pretrained(folder)
        for path in converted:
            put(path, folder / path.name)
        weights.write_index(folder, converted, pieces, found.parameters())
    run.finish(f"converted to {spec.dtype} safetensors: {found.parameters():,} parameters")


@contextlib.contextmanager
def in_megabytes(run: StageRun, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress display that counts bytes and shows megabytes."""
    with run.progress(what, round(total / MB), "MB") as advance:
        done = 0

        def count(bytes_: int) -> None:
            nonlocal done
            before, done = done // MB, done + bytes_
            if done // MB > before:
                advance(done // MB - before)

        yield count


def put(path: Path, target: Path) -> None:
    """Put a finished file into the output, if possible without a second copy on the disk.

    The file also stays in the scratch folder, so that nothing is lost if the stage is killed before its end.
    """
    try:
        os.link(path, target)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(path, target)
