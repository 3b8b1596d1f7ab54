"""Looks at a model from elsewhere: what `base` says of it before it converts the weights, and `check` says too.

found = look(spec, source, say)          # config, tokenizer, index: before any weights are downloaded
pieces = divide(found, source, say)      # the tensors by name, shape and type; no values are read
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from stages.checkpoint import weights
from stages.checkpoint.skeleton import skeleton
from stages.checkpoint.source import SMALL_FILES, Source, weight_files
from stages.run.errors import UserError
from stages.run.params import DirectoryModel, HubModel


@dataclass(frozen=True)
class Found:
    """A model that can be taken: its configs and tokenizer as they are to be saved, and where its weights lie."""

    model: Any
    tokenizer: Any
    expected: weights.Expected
    files: list[str]
    dtype: torch.dtype

    def parameters(self) -> int:
        """The number of its weights; tied ones count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def look(spec: HubModel | DirectoryModel, source: Source, say: Callable[[str], object]) -> Found:
    """Fetch the small files and check that they fit together; `say` is given a line for each choice that was made.

    Raises UserError when the model cannot be trained, or not without a choice that only its owner can make.
    """
    if "config.json" not in source.names:
        raise source.trouble or UserError(f"{source.folder}: has no config.json, so it is no model")
    source.fetch([name for name in source.names if re.fullmatch(SMALL_FILES, name)], lambda count: None)
    bones = skeleton(spec, source.folder)
    expected = weights.Expected(bones)
    files = weight_files(source, expected, say)
    for line in bones.lines:
        say(line)
    return Found(bones.model, bones.tokenizer, expected, files, getattr(torch, spec.dtype))


def divide(found: Found, source: Source, say: Callable[[str], object]) -> list[weights.Piece]:
    """Check the weights, which must be there by now, and divide them into pieces to convert."""
    pieces = weights.divide_all(source.folder, found.files, found.expected, found.dtype)
    if quantized := found.expected.quantized:
        say(
            f"config.json says that the weights are quantized ({quantized}), but they are plain; that is left out"
        )
    return pieces
