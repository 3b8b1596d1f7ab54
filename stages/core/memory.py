"""How much memory a stage needs, estimated from the model's shape, and the rows that fit.

A worked example: Abel-7B (hidden 4096, 32 layers, ffn 14336, bfloat16), SFT with rank 32 and rows of 1,024 tokens:

    weights 13.5 GiB + adapter 1.9 GiB + output tile 0.25 GiB
    + each row 0.72 GiB with gradient checkpointing, 8.5 GiB without

Everything is counted in bytes and follows from the config alone, so that `python -m stages check` can answer
before there are any weights. tests/core/test_memory.py holds the formulas against real training steps.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.core.devices import host_processes
from stages.core.errors import UserError
from stages.core.params import BuiltModel, Dpo, Hardware, Sft

GIB = 1024**3
AT_ONCE = (
    8  # sequences in training: enough to keep a GPU busy; with more of them more is padding (docs/gpus.md)
)
CPU_ROWS = 512  # more rows at once make a CPU no faster
GPU_ROWS = 1024  # nor a GPU: by then reading the weights is a small part of each step
PROMPT_TOKENS = 512  # where the prompts are not yet known; GSM8K's longest is under 300
USED = 0.9  # share of the free memory that is planned with; the rest is for fragments and for what is not counted
CONTEXT = GIB  # what CUDA and its libraries take of a GPU that no process uses yet
HEAD_COLUMNS, HEAD_TOKENS = 32768, 4096  # the tile in which TRL computes log-probabilities


@dataclass(frozen=True)
class Shape:
    """A decoder's dimensions; `width` is bytes per weight, which is also that of its activations."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    vocab: int
    tied: bool
    width: int

    @property
    def queries(self) -> int:
        """Numbers in a token's queries."""
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """Numbers in a token's keys, and as many in its values."""
        return self.kv_heads * self.head_size

    def linears(self) -> tuple[tuple[int, int], ...]:
        """Input and output size of the seven linear layers of a block: q, k, v, o, gate, up, down."""
        h, q, k, f = self.hidden, self.queries, self.keys, self.ffn
        return (h, q), (h, k), (h, k), (q, h), (h, f), (h, f), (f, h)

    def parameters(self) -> int:
        """Weights of the base model: linear layers, norms, embeddings and, unless tied, the output layer."""
        block = sum(a * b for a, b in self.linears()) + 2 * self.hidden
        tables = (1 if self.tied else 2) * self.vocab * self.hidden
        return self.layers * block + self.hidden + tables

    def adapter_parameters(self, rank: int) -> int:
        """Weights of a LoRA adapter on all linear layers: rank x (input + output) for each."""
        return self.layers * rank * sum(a + b for a, b in self.linears())


@dataclass(frozen=True)
class Device:
    """Memory to plan with. `free` is in bytes and for one process."""

    name: str
    cuda: bool
    total: int
    free: int


@dataclass(frozen=True)
class Need:
    """Bytes a stage needs: once, and for each row it takes at once."""

    fixed: int
    row: int

    def rows(self, free: int) -> int:
        """How many rows fit; 0 when not even one does."""
        return max(0, (int(free * USED) - self.fixed) // self.row)

    def at(self, rows: int) -> int:
        """Bytes needed for that many rows, the margin included."""
        return int((self.fixed + rows * self.row) / USED)


# ---- The model ---------------------------------------------------------------------------------------


def shape_of_config(config: Mapping[str, Any], where: str) -> Shape:
    """The shape from a model's config.json. Raises UserError when it is not that of a dense decoder."""
    try:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
        return Shape(
            hidden=hidden,
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or hidden // heads,
            ffn=config["intermediate_size"],
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
    return Shape(
        hidden=given.hidden,
        layers=given.layers,
        heads=given.heads,
        kv_heads=given.kv_heads,
        head_size=given.hidden // given.heads,
        ffn=given.ffn,
        vocab=given.vocab,
        tied=False,
        width=4,
    )


# ---- Training ----------------------------------------------------------------------------------------


def training_need(
    shape: Shape, spec: Sft | Dpo, tokens: int, rank: int, dropout: bool, checkpointing: bool, cuda: bool
) -> Need:
    """What SFT or DPO needs, every row (of a pair: each side, with the prompt) `tokens` long.

    Once: the base weights and the adapter's 32-bit weights. Gradients, Adam's two averages and its temporary,
    and the sum over processes are 4 bytes each for a weight of the adapter. DPO has the reference adapter besides.

    A row: what the backward pass needs of it, and the larger of the two peaks it can meet: the tile of the output
    layer or the gradients inside one block. With checkpointing only each block's input is kept, and one block at a
    time is computed again. DPO's row is a pair, two sequences; the reference pass keeps nothing and its working
    memory is less than that of the backward pass, which comes later. TRL turns dropout off for DPO.
    """
    pair = isinstance(spec, Dpo)
    fixed = shape.parameters() * shape.width
    fixed += shape.adapter_parameters(rank) * 4 * (6 + pair)
    block = block_bytes(shape, rank, tokens, dropout and not pair, cuda)
    # The blocks' inputs; and the last one's output in 32 bits, which the final norm keeps.
    inputs = tokens * shape.hidden * (shape.layers * shape.width + 4)
    working = working_bytes(shape, tokens)
    head, tile = head_bytes(shape, tokens, cuda)
    fixed += tile
    if checkpointing:
        row = inputs + max(head, block + working)
    else:
        row = tokens * shape.hidden * 4 + shape.layers * block + max(head, working)
    return Need(fixed, row * (2 if pair else 1))


def block_bytes(shape: Shape, rank: int, tokens: int, dropout: bool, cuda: bool) -> int:
    """Bytes one transformer block keeps of a row for its backward pass.

    The frozen linear layers keep nothing. For every token are kept:
    - two norms: their input in 32 bits and its inverse root;
    - each linear layer's LoRA: `rank` numbers between A and B, and its input. After dropout that is a copy of its own,
      with dropout's mask: a byte a number on CUDA, as much again on a CPU. Without dropout q, k and v share their
      input, so do gate and up, and o's is the attention's output;
    - attention: queries, keys and values (as many heads as the queries have, where rows are padded), the output and
      a 32-bit sum for each head; in a padded batch also a row of the mask, one number a token;
    - SwiGLU: gate, its activation, and up.
    """
    h, q, f, width = shape.hidden, shape.queries, shape.ffn, shape.width
    inputs = sum(size for size, _ in shape.linears())
    norms = 2 * (h + 1) * 4
    lora = inputs * (width + (1 if cuda else width)) if dropout else (2 * h + f) * width
    between = len(shape.linears()) * rank * width
    attention = 4 * q * width + 4 * shape.heads + tokens * width
    return tokens * (norms + lora + between + attention + 3 * f * width)


def working_bytes(shape: Shape, tokens: int) -> int:
    """Bytes that come and go inside one block: gradients of the widest layers, and LoRA's 32-bit copies.

    At the widest place, the feed-forward, three gradients of its size are there at once, the LoRA branch's in 32 bits;
    beside it the gradient of the block's output and what is added to it.
    """
    return tokens * 4 * (3 * shape.ffn + 2 * shape.hidden)


def head_bytes(shape: Shape, tokens: int, cuda: bool) -> tuple[int, int]:
    """Bytes of the output layer: for a row, and for the tile, which grows no further than 4,096 tokens.

    TRL never has the logits of all tokens: it computes log-probabilities in tiles of 4,096 tokens by 32,768
    words, once forwards and once more backwards. On CUDA a kernel works inside the tile; elsewhere about six
    32-bit copies of what is used of it are made. A row has its last states, and their gradient, in 32 bits.
    """
    columns = min(shape.vocab, HEAD_COLUMNS)
    tile = HEAD_COLUMNS * shape.width
    if not cuda:
        tile += 6 * columns * 4
    weights = 0 if cuda else columns * shape.hidden * 4
    return tokens * shape.hidden * 8, HEAD_TOKENS * tile + weights


# ---- Generation --------------------------------------------------------------------------------------


def generation_need(shape: Shape, rank: int | None, prompt: int, new: int) -> Need:
    """What generating with transformers needs, for prompts and completions of at most `prompt` and `new` tokens.

    Once: the weights, and the adapter in 32 bits (`rank` None: there is none). A row: its keys and values in every
    block, with two blocks' worth to spare for the moment in which a cache grows or loses finished rows; and beside
    those of the prompt what reading it takes, all rows at once, or beside those of all tokens what choosing the
    next one from its logits takes.
    """
    fixed = shape.parameters() * shape.width + (shape.adapter_parameters(rank) * 4 if rank else 0)
    token = 2 * shape.keys * shape.width * (shape.layers + 2)
    room = prompt + new + 64
    # Reading: gate and up, and LoRA's branch in 32 bits beside them; states, queries, repeated keys and values;
    # the mask of a padded batch, as truth values and as numbers.
    wide = 2 * shape.width + 10 if rank else 3 * shape.width
    reading = prompt * (token + shape.ffn * wide + (4 * shape.hidden + 3 * shape.queries) * shape.width)
    reading += prompt * prompt * (shape.width + 1)
    # Choosing: logits, probabilities and their sums in 32 bits, sorted ones with 64-bit places, and sorting's own.
    choosing = room * (token + 12) + 48 * shape.vocab
    return Need(fixed, max(reading, choosing))


# ---- This process's device ---------------------------------------------------------------------------


def own_device(hardware: Hardware) -> Device:
    """The device this process computes on, and what of its memory is free, torch's own reserve included."""
    import torch

    if not torch.cuda.is_available():
        return cpu_device(host_processes(hardware))
    index = int(os.environ.get("LOCAL_RANK", "0"))
    free, total = torch.cuda.mem_get_info(index)
    free += torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
    return Device(torch.cuda.get_device_name(index), True, total, free)


def cpu_device(processes: int) -> Device:
    """The host's memory, divided among `processes`; no more than the container may have of it."""
    import psutil

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
    """`plan_training` for this process's device, with the model in memory and rows of at most `longest` tokens."""
    if hardware.per_device_batch != "auto" and hardware.gradient_checkpointing != "auto":  # any model
        return min(hardware.per_device_batch, most or spec.batch), hardware.gradient_checkpointing
    device, shape, adapter = own_device(hardware), _shape(model), model.peft_config["default"]

    def need(checkpointing: bool) -> Need:
        dropout = adapter.lora_dropout > 0
        return training_need(shape, spec, longest, adapter.r, dropout, checkpointing, device.cuda)

    return plan_training(need, spec, hardware, device.free + _held(model), processes, most)


def plan_training(
    need: Callable[[bool], Need],
    spec: Sft | Dpo,
    hardware: Hardware,
    free: int,
    processes: int,
    most: int | None = None,
) -> tuple[int, bool]:
    """Rows to take at once in training, and whether to recompute activations (gradient checkpointing).

    `need` gives the memory without and with recomputing. `auto` takes AT_ONCE sequences where they fit, and keeps
    the activations where that fits as well: computing them again costs a forward pass, a third more work.
    `most` rows are left after memory ran out; then nothing is kept that can be computed again.
    """
    given, checkpointing = hardware.per_device_batch, hardware.gradient_checkpointing
    wanted = max(1, AT_ONCE // (2 if isinstance(spec, Dpo) else 1)) if given == "auto" else given
    wanted = min(wanted, spec.batch // processes, most or spec.batch)
    if checkpointing == "auto":
        checkpointing = most is not None or need(False).rows(free) < wanted
    if given == "auto":
        wanted = min(wanted, max(1, need(checkpointing).rows(free)))
    return wanted, checkpointing


def generation_batch(model: Any, hardware: Hardware, prompt: int, new: int) -> int:
    """Rows to generate at once, for prompts and completions of at most `prompt` and `new` tokens.

    `auto` gives a power of two, so that a little more or less free memory makes no other batches.
    """
    if hardware.generation_batch != "auto":
        return hardware.generation_batch
    device = own_device(hardware)
    adapters = getattr(model, "peft_config", {})
    rank = max((one.r for one in adapters.values()), default=None)
    need = generation_need(_shape(model), rank, prompt, new)
    return generation_rows(need, device, _held(model))


def generation_rows(need: Need, device: Device, held: int = 0) -> int:
    """The power of two that fits, at least 1; `held` bytes of what is needed are already there."""
    most = GPU_ROWS if device.cuda else CPU_ROWS
    return 1 << (min(most, max(1, need.rows(device.free + held))).bit_length() - 1)


def _shape(model: Any) -> Shape:
    dtype = next(model.parameters()).dtype
    return shape_of_config({**model.config.to_dict(), "dtype": str(dtype)}, "the base model's config")


def _held(model: Any) -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())
