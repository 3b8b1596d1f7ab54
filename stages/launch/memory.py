"""Estimates the memory that a stage needs from the model's shape, and the number of rows that fit.

All figures are bytes and follow from the config alone, so that `python -m stages check` can answer before the weights
are there. tests/launch/test_memory.py compares the formulas with real training steps.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from stages.launch.devices import host_processes
from stages.run.errors import UserError
from stages.run.params import BuiltModel, Dpo, Hardware, Sft

GIB = 1024**3
# Sequences of one forward pass in training. Eight keep a GPU busy; more would only add padding (docs/gpus.md).
SEQUENCES = 8
CPU_ROWS = 512  # in generation, more rows do not make a CPU faster
GPU_ROWS = 1024  # nor a GPU: by then reading the weights is a small part of each step
PROMPT_TOKENS = 512  # assumed while the prompts are not known; GSM8K's longest is under 300
USED = 0.9  # share of the free memory to plan with; the rest covers fragmentation and what is not counted
CONTEXT = GIB  # memory that CUDA and its libraries take on a GPU before any process uses it
# GPT-2's names for a config's settings.
OLDER = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
}
HEAD_COLUMNS, HEAD_TOKENS = 32768, 4096  # the tile in which TRL computes log-probabilities


@dataclass(frozen=True)
class Shape:
    """A decoder's dimensions. `width` is the bytes of one weight, and of one activation."""

    hidden: int
    layers: int
    heads: int
    queries: int  # size of a token's queries, over all heads
    keys: int  # and of its keys; the values have the same size
    ffn: int
    vocab: int
    tied: bool
    width: int

    def linears(self) -> tuple[tuple[int, int], ...]:
        """Input and output size of the seven linear layers of a block: q, k, v, o, gate, up, down."""
        h, q, k, f = self.hidden, self.queries, self.keys, self.ffn
        return (h, q), (h, k), (h, k), (q, h), (h, f), (h, f), (f, h)

    def parameters(self) -> int:
        """Number of weights: linear layers, norms, embeddings and, unless tied, the output layer."""
        block = sum(a * b for a, b in self.linears()) + 2 * self.hidden
        tables = (1 if self.tied else 2) * self.vocab * self.hidden
        return self.layers * block + self.hidden + tables

    def adapter_parameters(self, rank: int) -> int:
        """Number of weights of a LoRA adapter on all linear layers: rank x (input + output) for each."""
        return self.layers * rank * sum(a + b for a, b in self.linears())


@dataclass(frozen=True)
class Device:
    """The memory of a device, in bytes; `free` is what one process may use."""

    name: str
    cuda: bool
    total: int
    free: int


@dataclass(frozen=True)
class Need:
    """Bytes that a stage needs: a fixed part, and more for each row it computes together."""

    fixed: int
    row: int

    def rows(self, free: int) -> int:
        """How many rows fit; 0 when not even one does."""
        return max(0, (int(free * USED) - self.fixed) // self.row)

    def at(self, rows: int) -> int:
        """Bytes needed for that many rows, including the margin."""
        return int((self.fixed + rows * self.row) / USED)


# ---- The model ---------------------------------------------------------------------------------------


def shape_of_config(config: Mapping[str, Any], where: str) -> Shape:
    """The shape from a model's config.json. Raises UserError when it is not that of a dense decoder."""
    config = {OLDER.get(name, name): value for name, value in config.items()}
    try:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        size = config.get("head_dim") or hidden // heads
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
        return Shape(
            hidden=hidden,
            layers=config["num_hidden_layers"],
            heads=heads,
            queries=heads * size,
            keys=(config.get("num_key_value_heads") or heads) * size,
            ffn=config["intermediate_size"] or 4 * hidden,
            vocab=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", False)),
            width=4 if dtype == "float32" else 2,
        )
    except KeyError as key:
        raise UserError(
            f"{where}: says no {key.args[0]}, so its memory cannot be estimated; "
            "set hardware.per_device_batch and hardware.generation_batch to numbers and "
            "hardware.gradient_checkpointing to true or false"
        ) from None


def shape_of_built(model: BuiltModel) -> Shape:
    """The shape of the model that the `base` stage builds, which is in 32-bit precision."""
    given = model.architecture
    keys = given.kv_heads * given.hidden // given.heads
    sizes = given.model_dump(exclude={"kv_heads", "context"})
    return Shape(**sizes, queries=given.hidden, keys=keys, tied=False, width=4)


# ---- Training ----------------------------------------------------------------------------------------


def training_need(
    shape: Shape, spec: Sft | Dpo, tokens: int, rank: int, dropout: bool, checkpointing: bool, cuda: bool
) -> Need:
    """Memory of SFT or DPO, when every sequence (each side of a pair, with the prompt) has `tokens` tokens.

    Fixed: the base weights and the adapter. An adapter weight takes 4 bytes each for itself, its gradient, Adam's two
    averages, Adam's temporary and the sum over processes. DPO has a second adapter, the reference.

    A row: what its backward pass needs, plus the larger of two peaks: the tile of the output layer, or the gradients
    inside one block. With checkpointing each block keeps only its input, and one block at a time is recomputed. In DPO
    a row is a pair of two sequences. Its reference pass keeps nothing and needs less than the backward pass after it.
    TRL turns dropout off for DPO.
    """
    pair = isinstance(spec, Dpo)
    fixed = shape.parameters() * shape.width
    fixed += shape.adapter_parameters(rank) * 4 * (6 + pair)
    block = block_bytes(shape, rank, tokens, dropout and not pair, cuda)
    # The inputs of all blocks, and the output of the last one in 32 bits, which the final norm keeps.
    inputs = tokens * shape.hidden * (shape.layers * shape.width + 4)
    # The gradients inside a block are most in its feed-forward layer: three of that layer's size at the same time (the
    # LoRA branch's in 32 bits), that of the block's output, and what is added to it.
    working = tokens * 4 * (3 * shape.ffn + 2 * shape.hidden)
    head, tile = head_bytes(shape, tokens, cuda)
    fixed += tile
    if checkpointing:
        row = inputs + max(head, block + working)
    else:
        row = tokens * shape.hidden * 4 + shape.layers * block + max(head, working)
    return Need(fixed, row * (2 if pair else 1))


def block_bytes(shape: Shape, rank: int, tokens: int, dropout: bool, cuda: bool) -> int:
    """Bytes that one transformer block keeps of a row for its backward pass.

    The frozen linear layers keep nothing. For every token the block keeps:
    - two norms: the input in 32 bits and its inverse root;
    - LoRA of each linear layer: `rank` numbers between A and B, and the input. Dropout makes a copy of the input and
      a mask (one byte per number on CUDA, the full width on a CPU). Without dropout q, k and v share their input, gate
      and up share theirs, and o's input is the output of attention;
    - attention: queries, keys and values (repeated to the number of query heads when rows are padded), the output, and
      a 32-bit sum for each head; in a padded batch also one row of the mask;
    - SwiGLU: gate, its activation, and up.
    """
    h, q, f, width = shape.hidden, shape.queries, shape.ffn, shape.width
    inputs = sum(size for size, _ in shape.linears())
    norms = 2 * (h + 1) * 4
    lora = inputs * (width + (1 if cuda else width)) if dropout else (2 * h + f) * width
    between = len(shape.linears()) * rank * width
    attention = 4 * q * width + 4 * shape.heads + tokens * width
    return tokens * (norms + lora + between + attention + 3 * f * width)


def head_bytes(shape: Shape, tokens: int, cuda: bool) -> tuple[int, int]:
    """Bytes of the output layer: for each row, and for one tile.

    TRL never holds the logits of all tokens. It computes log-probabilities in tiles of at most 4,096 tokens by 32,768
    words, once in the forward and once in the backward pass. On CUDA a kernel works inside the tile; elsewhere there
    are about six 32-bit copies of its used part. Each row has its last states, and their gradient, in 32 bits.
    """
    columns = min(shape.vocab, HEAD_COLUMNS)
    tile = HEAD_COLUMNS * shape.width
    if not cuda:
        tile += 6 * columns * 4
    weights = 0 if cuda else columns * shape.hidden * 4
    return tokens * shape.hidden * 8, HEAD_TOKENS * tile + weights


# ---- Generation --------------------------------------------------------------------------------------


def generation_need(shape: Shape, rank: int | None, prompt: int, new: int) -> Need:
    """Memory of generation with transformers, for prompts and completions of at most `prompt` and `new` tokens.

    Fixed: the weights, and the adapter in 32 bits, as while it trains (`rank` None: no adapter). A row: its keys and
    values in every block, and those of two more blocks for the moment when the cache grows or drops finished rows. The
    cache grows by doubling once the prompts are read, to the longest row at most. Added is the larger of two peaks:
    reading the prompts, or drawing a token from the logits.
    """
    fixed = shape.parameters() * shape.width + (shape.adapter_parameters(rank) * 4 if rank else 0)
    token = 2 * shape.keys * shape.width * (shape.layers + 2)
    room = prompt + new
    # Reading: gate and up, with LoRA's branch in 32 bits; states, queries, repeated keys and values; the mask of a
    # padded batch, as booleans and as numbers.
    wide = 2 * shape.width + 10 if rank else 3 * shape.width
    reading = prompt * (token + shape.ffn * wide + (4 * shape.hidden + 3 * shape.queries) * shape.width)
    reading += prompt * prompt * (shape.width + 1)
    # Drawing: logits, probabilities and their sums in 32 bits, sorted values with 64-bit indices, and the sort's own.
    drawing = room * (token + 12) + 48 * shape.vocab
    return Need(fixed, max(reading, drawing))


# ---- This process's device ---------------------------------------------------------------------------


def own_device(hardware: Hardware) -> Device:
    """The device of this process and its free memory, which includes what torch has reserved and not used."""
    import torch

    if not torch.cuda.is_available():
        return cpu_device(host_processes(hardware))
    index = int(os.environ.get("LOCAL_RANK", "0"))
    free, total = torch.cuda.mem_get_info(index)
    free += torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
    return Device(torch.cuda.get_device_name(index), True, total, free)


def cpu_device(processes: int) -> Device:
    """The host's memory, or what its container may use, divided among `processes`."""
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit ("max")
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        total, free = min(total, limit), min(free, limit - int((group / "memory.current").read_text()))
    return Device("CPU", False, total, max(0, free) // processes)


def training_rows(
    model: Any, spec: Sft | Dpo, hardware: Hardware, longest: int, processes: int, most: int | None
) -> tuple[int, bool]:
    """`rows_and_checkpointing` for this process, with the model in memory and rows of at most `longest` tokens."""
    device, adapter = own_device(hardware), model.peft_config["default"]

    # Not called when the profile gives numbers, so that a model of any kind can be trained then.
    def need(checkpointing: bool) -> Need:
        dropout = adapter.lora_dropout > 0
        return training_need(_shape(model), spec, longest, adapter.r, dropout, checkpointing, device.cuda)

    free = device.free + model.get_memory_footprint()  # the need has the model in it
    return rows_and_checkpointing(need, spec, hardware, free, processes, most)


def rows_and_checkpointing(
    need: Callable[[bool], Need],
    spec: Sft | Dpo,
    hardware: Hardware,
    free: int,
    processes: int,
    most: int | None = None,
) -> tuple[int, bool]:
    """The rows of one forward pass in training, and whether to use gradient checkpointing.

    `need(checkpointing)` is the memory needed. `auto` takes SEQUENCES sequences if they fit, and keeps the activations
    if that fits too, because recomputing them costs another forward pass, a third more work. `most` is given after
    memory ran out: it limits the rows, and turns checkpointing on.
    """
    given, checkpointing = hardware.per_device_batch, hardware.gradient_checkpointing
    wanted = max(1, SEQUENCES // (2 if isinstance(spec, Dpo) else 1)) if given == "auto" else given
    wanted = min(wanted, spec.batch // processes, most or spec.batch)
    if checkpointing == "auto":
        checkpointing = most is not None or need(False).rows(free) < wanted
    if given == "auto":
        wanted = min(wanted, max(1, need(checkpointing).rows(free)))
    return wanted, checkpointing


def generation_batch(model: Any, hardware: Hardware, prompt: int, new: int) -> int:
    """Rows to generate together, for prompts and completions of at most `prompt` and `new` tokens.

    `auto` gives a power of two, so that a little more or less free memory does not change the batches.
    """
    if hardware.generation_batch != "auto":
        return hardware.generation_batch
    device = own_device(hardware)
    adapters = getattr(model, "peft_config", {})
    rank = max((one.r for one in adapters.values()), default=None)
    need = generation_need(_shape(model), rank, prompt, new)
    return generation_rows(need, device, model.get_memory_footprint())


def generation_rows(need: Need, device: Device, held: int = 0) -> int:
    """The largest power of two that fits, at least 1. `held` bytes of the need are in memory already."""
    most = GPU_ROWS if device.cuda else CPU_ROWS
    return 1 << (min(most, max(1, need.rows(device.free + held))).bit_length() - 1)


def _shape(model: Any) -> Shape:
    dtype = next(model.parameters()).dtype
    return shape_of_config({**model.config.to_dict(), "dtype": str(dtype)}, "the base model's config")
