"""Rewrites published weights as safetensors of one precision, a piece at a time.

    expected = Expected(skeleton)
    pieces = divide_all(folder, files, expected, dtype)  # checks every tensor's name, shape and type
    paths = convert(run, folder, pieces, expected, torch.bfloat16)
    write_index(target, paths, pieces, parameters)

A piece holds at most 1 GB of one file's tensors, and only one piece is in memory. The hash of each finished piece is
noted, so that a killed run goes on after it. Pickles are read by `torch.load(weights_only=True)`, which runs no code.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from stages.checkpoint.skeleton import Skeleton
from stages.run.errors import UserError
from stages.run.files import read_json, sha256_file, sync_folder
from stages.run.stage import StageRun

PIECE_BYTES = 1_000_000_000  # of output; converting fp32 weights takes about four times as much memory
MB = 1_000_000
SAFE, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
# Older checkpoints store these tensors, though models compute them. A model's class names others that it ignores.
COMPUTED = r"rotary_emb\.inv_freq|\.masked_bias$"
PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
POINTER = b"version https://git-lfs"  # stands in for a large file that git-lfs has not fetched


@dataclass(frozen=True)
class Piece:
    """Tensors of one source file that are converted together."""

    source: str
    names: tuple[str, ...]
    bytes: int


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index of a sharded checkpoint."""
    index = read_json(path)
    found = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(found, dict) or not found:
        raise UserError(f"{path}: has no weight_map; get the file anew")
    for file in found.values():
        # A downloaded index must not point out of its folder.
        if not isinstance(file, str) or not re.fullmatch(r"[^/]+\.(safetensors|bin)", file):
            raise UserError(f"{path}: names {file!r:.80}, which is not a file of weights beside it")
    return found


class Expected:
    """The tensors that a model of this config has, read from one that was built on torch's `meta` device.

    `shapes` are those in the files, `written` those in the result: each tensor once, tied ones under their source's
    name, and embeddings with the rows of `skeleton.rows`. Both by transformers' names for them. The files may have the
    names of when the model was published; `own` translates them.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        model, self.quantized = skeleton.model, skeleton.quantized
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        tied = model.all_tied_weights_keys
        self.tied = {copy: source for copy, source in tied.items() if copy in self.shapes}
        self._ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), COMPUTED]
        mapping = get_model_conversion_mapping(model)
        self._renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
        self._prefix = model.base_model_prefix
        if skeleton.rows > model.get_input_embeddings().weight.shape[0]:
            with torch.device("meta"):
                model.resize_token_embeddings(skeleton.rows, mean_resizing=False)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.written = {name: shape for name, shape in shapes.items() if name not in self.tied}

    def own(self, name: str) -> str:
        """transformers' name for a tensor of a file."""
        if name in self.shapes:
            return name
        renamed, _ = rename_source_key(name, self._renamings, [], self._prefix, self.shapes)
        return str(renamed)

    def bytes(self, dtype: torch.dtype) -> int:
        """Size of the converted weights."""
        return sum(math.prod(shape) for shape in self.written.values()) * dtype.itemsize

    def check(self, found: Iterable[str] | Mapping[str, tuple[int, ...]], where: Path) -> None:
        """Raise UserError unless the found tensors (own names, or shapes by own name) are exactly the model's."""
        names = set(found)
        lacking = sorted(self.written.keys() - names)
        others = sorted(
            name
            for name in names - self.shapes.keys()
            if not any(re.search(pattern, name) for pattern in self._ignored)
        )
        problems = []
        if lacking:
            problems.append(f"lack {len(lacking)} of the model's tensors ({lacking[0]} the first)")
        if others:
            problems.append(f"hold {len(others)} that the model does not have ({others[0]} the first)")
        if isinstance(found, Mapping):
            wrong = [name for name in sorted(names & self.shapes.keys()) if found[name] != self.shapes[name]]
            if wrong:
                shapes = f"{list(found[wrong[0]])} instead of {list(self.shapes[wrong[0]])}"
                problems.append(f"hold {len(wrong)} of another shape ({wrong[0]} the first, {shapes})")
        if problems and self.quantized:
            raise UserError(
                f"{where}: the weights are quantized ({self.quantized}), and only plain ones can be trained on, so "
                "take the model as it was before quantization"
            )
        if problems:
            raise UserError(
                f"{where}: the weights {', and '.join(problems)}; get the files anew, or check config.json "
                "and model.overrides"
            )


def divide_all(folder: Path, files: Iterable[str], expected: Expected, dtype: torch.dtype) -> list[Piece]:
    """Check every tensor of `files` without reading its values, and divide the tensors into pieces.

    Raises UserError when a file is missing, damaged or holds code, or when the tensors are not the model's.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[str, tuple[str, str]] = {}  # own name -> file, and the name in it
    pieces = []
    for file in files:
        tensors = load(folder / file)
        for name, tensor in tensors.items():
            own = expected.own(name)
            if own in shapes:
                raise UserError(f"{folder / file}: holds {name}, which another file holds too")
            plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.dtype in PLAIN
            if own in expected.shapes and not plain:
                raise UserError(
                    f"{folder / file}: {name} is {str(tensor.dtype).removeprefix('torch.')}; only plain floating-point "
                    "weights can be trained on, so take the model as it was before quantization"
                )
            shapes[own], places[own] = tuple(tensor.shape), (file, name)
        pieces += divide(file, tensors, expected, dtype)
        del tensors
    expected.check(shapes, folder)
    for copy, source in expected.tied.items():
        if copy not in places:
            continue
        (file, name), (holder, origin) = places[copy], places[source]
        if not torch.equal(load(folder / file)[name], load(folder / holder)[origin]):
            raise UserError(
                f"{folder / file}: {name} differs from {origin}, though the config says that they are one; set "
                "model.overrides: {tie_word_embeddings: false}"
            )
    return pieces


def divide(file: str, names: Iterable[str], expected: Expected, dtype: torch.dtype) -> list[Piece]:
    """Divide the tensors of one file, in order, into pieces of at most PIECE_BYTES. A larger tensor is one piece."""
    pieces: list[Piece] = []
    group: list[str] = []
    total = 0
    for name in names:
        if (own := expected.own(name)) not in expected.written:
            continue
        size = math.prod(expected.written[own]) * dtype.itemsize
        if group and total + size > PIECE_BYTES:
            pieces.append(Piece(file, tuple(group), total))
            group, total = [], 0
        group.append(name)
        total += size
    return [*pieces, Piece(file, tuple(group), total)] if group else pieces


def load(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file of weights. Their values are read from the disk when they are used.

    Raises UserError when the file is missing, damaged, or holds code or anything else but weights.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(POINTER))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); get the file anew") from None
    if start == POINTER:
        raise UserError(f"{path}: is git-lfs's pointer to the file, not the file; run `git lfs pull` there")
    tensors: Any
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        else:
            # Files from before torch 1.6 are no zip archives and cannot be mapped into memory.
            archive = start.startswith(b"PK")
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise UserError(
                f"{path}: holds code ({code[1]}), which is never run; take safetensors, or files of another source"
            ) from None
        raise UserError(f"{path}: is damaged, or holds more than weights; get the file anew") from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle may end in any error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: is damaged or cut off ({reason:.160}); get the file anew") from None
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise UserError(f"{path}: holds {type(tensors).__name__}, not tensors by name")
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"{path}: {name} is {type(tensor).__name__}, not a tensor")
    return tensors


def convert(
    run: StageRun, folder: Path, pieces: list[Piece], expected: Expected, dtype: torch.dtype
) -> list[Path]:
    """Write each piece as safetensors into the stage's scratch folder, but for those that an earlier run finished.

    Raises UserError when a weight is not a finite number.
    """
    paths = []
    total = sum(piece.bytes for piece in pieces)
    with run.journal() as journal, run.progress("converting", round(total / MB), "MB") as advance:
        for number, piece in enumerate(pieces, 1):
            name = f"model-{number:05d}-of-{len(pieces):05d}.safetensors" if len(pieces) > 1 else SAFE
            path, source = run.work / name, (folder / piece.source).stat()
            # The key changes when another file takes the source's place, or the embeddings get other rows.
            key = f"{name} of {piece.source}, {source.st_size} bytes at {source.st_mtime_ns}, to {piece.bytes} bytes"
            known = journal.records.get(key)
            if not (known and path.is_file() and sha256_file(path) == known["sha256"]):
                journal.add({"id": key, "sha256": write_piece(folder, piece, path, expected, dtype)})
                journal.flush()
            paths.append(path)
            advance(round(piece.bytes / MB))
    return paths


def write_piece(folder: Path, piece: Piece, path: Path, expected: Expected, dtype: torch.dtype) -> str:
    """Convert one piece; returns the SHA-256 of the file."""
    tensors = load(folder / piece.source)
    converted = {}
    for name in piece.names:
        # Always copied: tensors of a pickle may share memory, which safetensors refuses.
        converted[name] = tensors[name].to(dtype, copy=True, memory_format=torch.contiguous_format)
        if expected.written[expected.own(name)] != converted[name].shape:
            converted[name] = with_rows(converted[name], expected.written[expected.own(name)][0])
        if converted[name].numel() and not all(
            math.isfinite(edge.item()) for edge in torch.aminmax(converted[name])
        ):
            raise UserError(
                f"{folder / piece.source}: {name} holds values that are not numbers; get the file anew"
            )
    del tensors  # frees the memory into which the source was read
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(converted, temporary, metadata={"format": "pt"})
    del converted
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    digest = sha256_file(temporary)
    temporary.replace(path)
    sync_folder(path.parent)
    return digest


def with_rows(table: torch.Tensor, rows: int) -> torch.Tensor:
    """An embedding or output layer grown to `rows`, each new one the mean of the others.

    A row of zeros in the output layer could be the likeliest token of all. That of the mean gets at most the average
    probability of the others (Hewitt 2021, "Initializing new word embeddings for pretrained language models").
    """
    mean = table.mean(0, keepdim=True, dtype=torch.float32).to(table.dtype)
    return torch.cat([table, mean.expand(rows - len(table), *mean.shape[1:])])


def write_index(folder: Path, paths: list[Path], pieces: list[Piece], parameters: int) -> None:
    """Write the index that says which file holds which tensor. A single file needs none."""
    if len(paths) == 1:
        return
    where = {name: path.name for path, piece in zip(paths, pieces, strict=True) for name in piece.names}
    about = {"total_parameters": parameters, "total_size": sum(piece.bytes for piece in pieces)}
    text = json.dumps({"metadata": about, "weight_map": where}, indent=2, sort_keys=True) + "\n"
    (folder / SAFE_INDEX).write_text(text, encoding="utf-8")


def finished_bytes(run: StageRun) -> int:
    """Size of the pieces that an earlier run finished."""
    return sum(path.stat().st_size for path in run.work.glob("model*.safetensors"))
