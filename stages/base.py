"""The base model: built on the spot, taken from the hub at a pinned revision, or from a folder.

Whatever it came as, `checkpoints/base/` holds safetensors in one precision, the config, and a tokenizer
whose pad token differs from its end token. What is small is fetched and checked first: a wrong config, tokenizer or
index, or a disk too small, is told before the weights are downloaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from stages.checkpoint.hub import Repository
from stages.core.errors import UserError
from stages.core.launch import fix_arithmetic
from stages.core.params import BuiltModel, DirectoryModel, HubModel
from stages.core.paths import BASE
from stages.core.records import read_json
from stages.core.stage import StageRun, atomic_folder, stage_run

if TYPE_CHECKING:
    from stages.checkpoint.weights import Expected

PAD_CANDIDATES = ("<pad>", "[PAD]", "<|pad|>", "<｜▁pad▁｜>", "<|finetune_right_pad_id|>", "<unk>")
# All that a config, a tokenizer and a chat template may consist of. Never code, never what training left behind.
SMALL_FILES = (
    r"(config|generation_config|added_tokens|special_tokens_map|vocab|chat_template)\.json|tokenizer.*\.json|"
    r".*\.(model|jinja)|(merges|vocab)\.txt|(model\.safetensors|pytorch_model\.bin)\.index\.json"
)
# Texts by which two tokenizers are compared. None begins with a space, as no prompt does: there they differ.
TOKENIZED = (
    "Question:\nAnn has 3 bags of 4 apples and eats 2.  How many are left?\nAnswer:\nLet's think step by step.\n",
    "3*4=<<3*4=12>>12 apples, 1,000.5 dollars – café, 中\n\n#### 10",
)
MB, GB = 10**6, 10**9


class Source(Protocol):
    """Where a model's files come from."""

    folder: Path
    trouble: UserError | None

    @property
    def names(self) -> list[str]:
        """All files there."""

    def missing_bytes(self, names: Iterable[str]) -> int:
        """How much of these files is still to be downloaded."""

    def fetch(self, names: Iterable[str], advance: Callable[[int], object]) -> None:
        """Have these files in `folder`."""


class Folder:
    """A model in a folder on this machine."""

    trouble: UserError | None = None

    def __init__(self, folder: Path) -> None:
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{folder}: has no config.json; model.path must be a folder laid out as on the hub"
            )
        self.folder = folder

    @property
    def names(self) -> list[str]:
        """All files there."""
        return sorted(path.name for path in self.folder.iterdir() if path.is_file())

    def missing_bytes(self, names: Iterable[str]) -> int:
        """Nothing is downloaded."""
        return 0

    def fetch(self, names: Iterable[str], advance: Callable[[int], object]) -> None:
        """They are there, or reading them will say so."""


def main() -> None:
    """Make `checkpoints/base/`."""
    with stage_run("base", sections=("model",), inputs=[], outputs=[BASE]) as run:
        spec = run.params.model
        if isinstance(spec, BuiltModel):
            build(run, spec)
        else:
            take(
                run,
                spec,
                Repository(spec, run.say) if isinstance(spec, HubModel) else Folder(Path(spec.path)),
            )


def build(run: StageRun, spec: BuiltModel) -> None:
    """Train the embedded model from scratch."""
    from stages.tiny.model import build_model

    fix_arithmetic(run.params.hardware.threads, spec.seed)
    with run.progress("pre-training", spec.corpus.problems, "problems") as advance:
        network, tokenizer = build_model(spec, advance)
    with atomic_folder(BASE) as folder:
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    run.say(f"built: {sum(p.numel() for p in network.parameters()):,} parameters, {len(tokenizer):,} tokens")


def take(run: StageRun, spec: HubModel | DirectoryModel, source: Source) -> None:
    """Fetch a model, check that everything fits together, and write it in the profile's precision."""
    import torch

    from stages.checkpoint import weights

    if "config.json" not in source.names:
        raise source.trouble or UserError(f"{source.folder}: has no config.json, so it is no model")
    source.fetch([name for name in source.names if re.fullmatch(SMALL_FILES, name)], lambda count: None)
    model, tokenizer = skeleton(spec, source.folder)
    dtype = getattr(torch, spec.dtype)
    expected = weights.Expected(model)
    files = weight_files(source, expected)
    check_room(run, source, files, expected.bytes(dtype) - weights.finished_bytes(run))

    missing = source.missing_bytes(files)
    with in_megabytes(run, "downloading", missing) as advance:
        source.fetch(files, advance)
    if missing:
        run.facts["downloaded_mb"] = round(missing / MB)
    pieces = weights.plan(source.folder, files, expected, dtype)
    converted = weights.convert(run, source.folder, pieces, dtype)

    with atomic_folder(BASE) as folder:
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for path in converted:
            put(path, folder / path.name)
        count = sum(parameter.numel() for parameter in model.parameters())
        if len(converted) > 1:
            where = {
                name: path.name for path, piece in zip(converted, pieces, strict=True) for name in piece.names
            }
            about = {"total_parameters": count, "total_size": sum(piece.bytes for piece in pieces)}
            text = json.dumps({"metadata": about, "weight_map": where}, indent=2, sort_keys=True) + "\n"
            (folder / weights.SAFE_INDEX).write_text(text, encoding="utf-8")
    run.say(f"converted to {spec.dtype} safetensors: {count:,} parameters")


def skeleton(spec: HubModel | DirectoryModel, folder: Path) -> tuple[Any, Any]:
    """The model without memory for its weights, its configs as they are to be saved, and its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, dynamic_module_utils

    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # else a model with code of its own asks whether to run it
    with readable(folder, "config.json"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    for name, value in spec.overrides.items():
        if not hasattr(config, name):
            raise UserError(f"model.overrides.{name}: the model's config has no such setting")
        setattr(config, name, value)
    with readable(folder, "the tokenizer"):
        tokenizer = read_tokenizer(folder)
    ensure_pad(tokenizer)
    with readable(folder, "config.json"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, spec.dtype))
    embeddings = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > embeddings:
        raise UserError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, more than the {embeddings} the model has "
            "embeddings for"
        )
    if (folder / "generation_config.json").is_file():
        with readable(folder, "generation_config.json"):
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    model.config.dtype = spec.dtype
    model.config.architectures = [type(model).__name__]
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    # The profile says how to decode; what the hub ships for sampling is dropped.
    model.generation_config.update(do_sample=False, temperature=None, top_p=None, top_k=None)
    return model, tokenizer


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model's folder, which must divide texts as its sentencepiece model does, where that is all.

    transformers 5 makes one from `tokenizer.model` by the kind of model, and then, for Mistral, leaves out the space
    before the first word. So the class that the tokenizer's own config names makes it, and the result is compared.
    """
    import transformers

    sentences = folder / "tokenizer.model"
    if (folder / "tokenizer.json").is_file() or not sentences.is_file():
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    from sentencepiece import SentencePieceProcessor

    settings = folder / "tokenizer_config.json"
    named = read_json(settings).get("tokenizer_class", "") if settings.is_file() else ""
    maker = getattr(transformers, named.removesuffix("Fast"), None) or transformers.AutoTokenizer
    tokenizer = maker.from_pretrained(folder, local_files_only=True)
    original = SentencePieceProcessor(model_file=str(sentences))
    for text in TOKENIZED:
        if tokenizer(text, add_special_tokens=False)["input_ids"] != original.encode(text):
            raise ValueError(
                f"{named or maker.__name__} divides texts in another way than tokenizer.model does"
            )
    return tokenizer


@contextlib.contextmanager
def readable(folder: Path, what: str) -> Iterator[None]:
    """Say in one line why transformers cannot read one of the small files."""
    try:
        yield
    except Exception as error:
        text = str(error)
        if "trust_remote_code" in text:
            reason = (
                "needs code of its own, which is never run; take a model that transformers knows by itself"
            )
        else:
            reason = f"cannot be read ({(text.strip().splitlines() or [type(error).__name__])[0]:.200})"
        raise UserError(f"{folder}: {what} {reason}") from error


def weight_files(source: Source, expected: Expected) -> list[str]:
    """The files that hold the weights; an index is compared with the model before they are fetched."""
    from stages.checkpoint import weights

    chosen = weights.choose(source.names)
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
    """Raise UserError when the disks cannot hold what is still to be downloaded and converted."""
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


@contextlib.contextmanager
def in_megabytes(run: StageRun, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress display that is told bytes and shows megabytes."""
    with run.progress(what, round(total / MB), "MB") as advance:
        done = 0

        def count(bytes_: int) -> None:
            nonlocal done
            before, done = done // MB, done + bytes_
            if done // MB > before:
                advance(done // MB - before)

        yield count


def put(path: Path, target: Path) -> None:
    """Put a finished file into the output, without a second copy on the disk where that is possible.

    It stays where it was as well, so that a kill before the stage has ended costs nothing.
    """
    try:
        os.link(path, target)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(path, target)


def ensure_pad(tokenizer: Any) -> None:
    """Give the tokenizer a pad token that is in its vocabulary and is not the end token."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    vocabulary = tokenizer.get_vocab()
    for name in PAD_CANDIDATES:
        if name in vocabulary and name != tokenizer.eos_token:
            tokenizer.pad_token = name
            return
    raise UserError("the tokenizer has no token that could serve for padding; add one to it and its model")
