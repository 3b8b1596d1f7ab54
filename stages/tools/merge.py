"""Merging a LoRA adapter into the weights of its base, tensor by tensor, in fp32.

    W' = W + scale · B·A      scale = alpha / r, with rank-stabilised LoRA alpha / sqrt(r)

Only one tensor is held in fp32 at a time and one shard of the result in memory, so a 7B model needs neither a GPU
nor 28 GB. Adding in bf16 instead would lose most of a small change; rounding the sum once is what a precision
costs at least, and that is measured.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from stages.core.errors import UserError
from stages.core.policy import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from stages.core.records import read_json, write_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Settings of an adapter that are read here, or that change nothing once it is trained. All others must be unset.
UNDERSTOOD = frozenset(
    "peft_type task_type peft_version base_model_name_or_path revision inference_mode auto_mapping r lora_alpha "
    "lora_dropout use_rslora target_modules exclude_modules layers_to_transform layers_pattern runtime_config "
    "megatron_core qalora_group_size".split()
)
UNSET: tuple[Any, ...] = (None, False, "none", {}, [])
MATRIX = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class Lora:
    """A trained adapter: for each weight it changes, A of shape (r, in) and B of shape (out, r)."""

    scale: float
    matrices: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def delta(self, name: str) -> torch.Tensor:
        """What it adds to one weight, in fp32, of shape (out, in)."""
        a, b = self.matrices[name]
        return self.scale * (b.float() @ a.float())


@dataclass
class Merged:
    """What was written. `change` and `error` are sums of squares over the weights the adapter changes."""

    files: list[str]
    total_bytes: int
    parameters: int
    change: float = 0.0  # of what the adapter adds
    error: float = 0.0  # of what rounding to the precision then does

    @property
    def rounding(self) -> float | None:
        """The rounding error's size, as a share of the adapter's change; None when that is nothing."""
        return math.sqrt(self.error / self.change) if self.change else None


def read_lora(folder: Path) -> Lora:
    """The adapter in a folder. Raises UserError when it is of a kind that is not merged here, or damaged."""
    config = read_json(folder / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{folder}: an adapter of kind {config.get('peft_type')} cannot be merged; only LoRA can"
        )
    settings = {name: value for name, value in config.items() if name not in UNDERSTOOD}
    if settings.pop("init_lora_weights", True) not in (True, False, "gaussian"):
        raise UserError(
            f"{folder}: its init_lora_weights changed the base weights too; it cannot be merged here"
        )
    for name, value in settings.items():
        if value not in UNSET:
            raise UserError(
                f"{folder}: an adapter with {name} ({value!r:.60}) cannot be merged here; only plain LoRA can"
            )
    r, alpha = int(config["r"]), float(config["lora_alpha"])
    try:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / ADAPTER_WEIGHTS}: cannot be read ({error}); run `dvc checkout`") from None
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        found = MATRIX.fullmatch(name)
        if not found:
            raise UserError(
                f"{folder}: holds {name}, which is no LoRA matrix of a linear layer; it cannot be merged here"
            )
        halves.setdefault(f"{found[1]}.weight", {})[found[2]] = tensor
    lora = Lora(alpha / (math.sqrt(r) if config.get("use_rslora") else r))
    for name, half in halves.items():
        if set(half) != {"A", "B"} or half["A"].shape[0] != r or half["B"].shape[1] != r:
            raise UserError(f"{folder}: the matrices of {name} do not fit rank {r}; run `dvc checkout`")
        lora.matrices[name] = half["A"], half["B"]
    return lora


def weight_files(folder: Path) -> dict[str, Path]:
    """For each tensor of a model folder, the safetensors file it is in, in the files' order.

    Raises UserError when there are none.
    """
    if (folder / INDEX).is_file():
        return {name: folder / file for name, file in read_json(folder / INDEX)["weight_map"].items()}
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            return dict.fromkeys(file.keys(), folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS}: cannot be read ({error}); run `dvc checkout`") from None


def total_bytes(folder: Path, dtype: torch.dtype | None) -> int:
    """How large the weights of a model folder become in a precision (None: each tensor's own)."""
    return sum(_bytes(shape, own, dtype) for shape, own in _shapes(weight_files(folder)).values())


def merge(
    base: Path,
    lora: Lora | None,
    out: Path,
    dtype: torch.dtype | None,
    shard_bytes: int,
    advance: Callable[[int], object] = lambda count: None,
) -> Merged:
    """Write the weights of `base`, with `lora` merged in, as safetensors into the folder `out`.

    `dtype` None keeps each tensor's own. No file is larger than `shard_bytes`, unless one tensor is.
    Raises UserError when the adapter does not fit the base, or a weight is too large for fp16.
    """
    files = weight_files(base)
    shapes = _shapes(files)
    _check_fit(base, lora, shapes)
    plan = split_state_dict_into_shards_factory(
        shapes,
        get_storage_size=lambda one: _bytes(one[0], one[1], dtype),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    total = int(plan.metadata["total_size"])
    merged = Merged(
        list(plan.filename_to_tensors), total, sum(math.prod(shape) for shape, _ in shapes.values())
    )
    for file, names in plan.filename_to_tensors.items():
        shard = {}
        for name in names:
            with safe_open(files[name], "pt") as source:
                weight = source.get_tensor(name)
            if weight.is_floating_point():
                weight = _merged(name, weight, lora, dtype or weight.dtype, merged)
            shard[name] = weight.contiguous()
            advance(1)
        save_file(shard, out / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {
            "metadata": {"total_size": total},
            "weight_map": dict(sorted(plan.tensor_to_filename.items())),
        }
        write_json(out / INDEX, index)
    return merged


def _merged(
    name: str, weight: torch.Tensor, lora: Lora | None, dtype: torch.dtype, merged: Merged
) -> torch.Tensor:
    """One weight with the adapter's part added in fp32, rounded once; what that costs is added up."""
    changed = lora is not None and name in lora.matrices
    exact = weight.float()
    if lora is not None and changed:
        delta = lora.delta(name)
        merged.change += float(delta.square().sum(dtype=torch.float64))
        exact = exact + delta
    rounded = exact.to(dtype)
    if changed:
        merged.error += float((rounded.float() - exact).square().sum(dtype=torch.float64))
    if dtype == torch.float16 and not rounded.isfinite().all() and exact.isfinite().all():
        largest = float(exact.abs().max())
        raise UserError(f"{name}: holds {largest:,.0f}, too large for fp16; choose --precision bf16 or fp32")
    return rounded


def _check_fit(base: Path, lora: Lora | None, shapes: dict[str, Any]) -> None:
    for name, (a, b) in lora.matrices.items() if lora else ():
        if name not in shapes:
            raise UserError(
                f"the adapter changes {name}, which is not among the weights in {base}; it cannot be merged"
            )
        wanted = (b.shape[0], a.shape[1])
        if shapes[name][0] != wanted:
            raise UserError(
                f"the adapter takes {name} for {wanted}, in {base} it is {shapes[name][0]}; it is of another base"
            )


def _shapes(files: dict[str, Path]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of every tensor, from the files' headers alone."""
    shapes = {}
    for path in dict.fromkeys(files.values()):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (no dict)
                    one = file.get_slice(name)
                    shapes[name] = tuple(one.get_shape()), one.get_dtype()
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error}); run `dvc checkout`") from None
    lacking = next((name for name in files if name not in shapes), None)
    if lacking:
        raise UserError(f"{files[lacking]}: lacks {lacking}, which the index names; run `dvc checkout`")
    return {name: shapes[name] for name in files}


def _bytes(shape: tuple[int, ...], own: str, dtype: torch.dtype | None) -> int:
    """Bytes of a tensor; `own` is its type as safetensors write it, such as BF16 or I64."""
    own_bits = int(re.sub(r"\D", "", own.partition("_")[0]) or 8)  # BOOL is a byte
    floating = own.startswith(("F", "BF"))
    return math.prod(shape) * (dtype.itemsize if dtype and floating else own_bits // 8)


def precision_of(folder: Path) -> str:
    """The precision a model folder's config declares: bf16, fp16 or fp32."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    declared = config.get("dtype") or config.get("torch_dtype") or "float32"
    names = {str(dtype).removeprefix("torch."): name for name, dtype in PRECISIONS.items()}
    if declared not in names:
        raise UserError(
            f"{folder}: its config says dtype {declared}; choose --precision {', '.join(PRECISIONS)}"
        )
    return names[declared]
