"""Compares the memory estimates with the bytes that real training steps and real generation take on the CPU."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.kernels.chunked_logprob
import trl.trainer.utils
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, SFTConfig

from stages.engine import transformers_engine
from stages.engine.transformers_engine import TransformersEngine
from stages.launch import memory
from stages.launch.memory import GIB, Device, Need, Shape, generation_need, training_need
from stages.policy.request import Request
from stages.run.errors import UserError
from stages.run.params import Dpo, Lora, Sft, load_params
from stages.sft import RowTrainer
from stages.train.pair_trainer import PairTrainer
from tests.policy import SMALL

# hidden, layers, heads, kv heads, ffn, vocab, LoRA rank, rows, tokens
SHAPES = [
    (64, 4, 4, 2, 224, 300, 4, 4, 100),
    (128, 6, 8, 2, 352, 1000, 16, 3, 200),
    (256, 3, 4, 4, 512, 2000, 8, 2, 120),
]
PRECISIONS = [torch.float32, torch.bfloat16]
# What, dropout, shape, precision, gradient checkpointing: any two values of different columns stand in one row.
TRAININGS = [
    ("sft", 0.05, SHAPES[0], torch.float32, False),
    ("sft", 0.05, SHAPES[1], torch.bfloat16, True),
    ("sft", 0.05, SHAPES[2], torch.float32, True),
    ("sft", 0.0, SHAPES[0], torch.bfloat16, True),
    ("sft", 0.0, SHAPES[1], torch.float32, False),
    ("sft", 0.0, SHAPES[2], torch.bfloat16, False),
    ("dpo", 0.0, SHAPES[0], torch.float32, True),
    ("dpo", 0.0, SHAPES[1], torch.bfloat16, False),
    ("dpo", 0.0, SHAPES[2], torch.float32, False),
]
AUTO = {"generation_batch": "auto", "per_device_batch": "auto", "gradient_checkpointing": True}
HARDWARE = load_params(SMALL).hardware.model_copy(update=AUTO)
# GAIR/Abel-7B-002's config.
ABEL = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 32032, "torch_dtype": "bfloat16",
}  # fmt: skip


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors made inside the block: those alive now, and the most at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, Any] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self.alive:
            return

        def gone(_: Any) -> None:
            del self.alive[place]
            self.now -= size

        self.alive[place] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


def sft_spec(tokens: int, rank: int) -> Sft:
    changed = {"batch": 64, "max_tokens": tokens, "lora": Lora(r=rank, alpha=8, dropout=0.0)}
    return load_params(SMALL).sft.model_copy(update=changed)


def dpo_spec(tokens: int) -> Dpo:
    return load_params(SMALL).dpo.model_copy(update={"batch": 64, "max_tokens": tokens})


def make_model(sizes: tuple[int, ...], dtype: torch.dtype, rank: int, dropout: float = 0.0) -> Any:
    hidden, layers, heads, kv_heads, ffn, vocab = sizes[:6]
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, sliding_window=None, pad_token_id=0,
    )  # fmt: skip
    lora = LoraConfig(r=rank, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(MistralForCausalLM(config).to(dtype), lora)


def shape_of(model: Any) -> Shape:
    return memory._shape(model)


def draw(vocab: int, count: int) -> list[int]:
    return torch.randint(4, vocab, (count,)).tolist()


def training_peak(
    what: str, sizes: tuple[int, ...], dtype: torch.dtype, checkpointing: bool, dropout: float, folder: Path
) -> tuple[int, Shape]:
    """The most bytes there are in two steps of TRL's trainer, weights and optimizer included."""
    vocab, rank, rows, tokens = sizes[5:]
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
    )  # fmt: skip
    common: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": rows, "max_steps": 2, "max_length": None,
        "bf16": dtype == torch.bfloat16, "gradient_checkpointing": checkpointing, "use_cpu": True,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    with Peak() as peak:
        model = make_model(sizes, dtype, rank, dropout)
        half = tokens // 2
        if what == "sft":
            texts = [draw(vocab, tokens - 10 * (row % 2)) for row in range(2 * rows)]  # padded batches
            data = [{"input_ids": text, "labels": [-100] * half + text[half:]} for text in texts]
            arguments = SFTConfig(**common, dataset_kwargs={"skip_prepare_dataset": True})
            trainer: Any = RowTrainer
        else:
            data = [
                {
                    "prompt_ids": draw(vocab, half),
                    "chosen_ids": draw(vocab, half),
                    "rejected_ids": draw(vocab, half - row % 7),
                }
                for row in range(2 * rows)
            ]
            arguments = DPOConfig(**common, beta=0.1, loss_type=["sigmoid"], loss_weights=[1.0])
            trainer = PairTrainer
        trainer(
            model=model, args=arguments, train_dataset=Dataset.from_list(data), processing_class=tokenizer
        ).train()
    return peak.most, shape_of(model)


@pytest.mark.parametrize(("what", "dropout", "sizes", "dtype", "checkpointing"), TRAININGS)
def test_training(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    what: str,
    dropout: float,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    checkpointing: bool,
) -> None:
    """At most 10 % too low and 60 % too high, for weights, adapter, activations and the output layer together.

    The output layer's tile is scaled down with the models.
    """
    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 256)
    monkeypatch.setattr(trl.kernels.chunked_logprob, "TOKEN_CHUNK_SIZE", 64)
    monkeypatch.setattr(memory, "HEAD_COLUMNS", 256)
    monkeypatch.setattr(memory, "HEAD_TOKENS", 64)
    rank, rows, tokens = sizes[6:]
    peak, shape = training_peak(what, sizes, dtype, checkpointing, dropout, tmp_path)
    spec = sft_spec(tokens, rank) if what == "sft" else dpo_spec(tokens)
    need = training_need(shape, spec, tokens, rank, dropout > 0, checkpointing, cuda=False)
    assert 0.9 * peak <= need.fixed + rows * need.row <= 1.6 * peak


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize(("prompt", "new"), [(60, 40), (200, 10)])
def test_generation(
    sizes: tuple[int, ...], dtype: torch.dtype, prompt: int, new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, keys and values, reading prompts and drawing tokens; within the same bounds as training."""
    monkeypatch.setattr(transformers_engine, "SMALL", 0)  # the bytes of another thread are not counted
    vocab, rank, rows, _ = sizes[5:]
    rows *= 4
    with Peak() as peak:
        model = make_model(sizes, dtype, rank).eval()
        peak.most = peak.now
        requests = [
            Request(str(row), tuple(draw(vocab, prompt - row % 9)), new, 1.0, 0.9, row) for row in range(rows)
        ]
        list(TransformersEngine(model, [2], 0, rows).generate(requests))
    need = generation_need(shape_of(model), rank, prompt, new)
    assert 0.9 * peak.most <= need.fixed + rows * need.row <= 1.6 * peak.most


def test_parameters_are_counted() -> None:
    """The exact numbers of the base model and of the adapter."""
    model = make_model(SHAPES[1], torch.float32, 16)
    shape = shape_of(model)
    sizes = {True: 0, False: 0}
    for weight in model.parameters():
        sizes[weight.requires_grad] += weight.numel()
    assert shape.parameters() == sizes[False] and shape.adapter_parameters(16) == sizes[True]


def test_abel_on_one_large_gpu() -> None:
    """A 7B model in bfloat16 has 7.24 billion weights. SFT and DPO fit with all rows into 80 GiB, not into 14."""
    shape = memory.shape_of_config(ABEL, "config.json")
    assert shape.parameters() == 7_241_732_096 + 2 * 32 * 4096  # Mistral-7B, and 32 words more
    for spec in (sft_spec(1024, 32), dpo_spec(1024)):
        with_checkpoints = training_need(shape, spec, 1024, 32, True, True, cuda=True)
        without = training_need(shape, spec, 1024, 32, True, False, cuda=True)
        assert with_checkpoints.rows(79 * GIB) >= 32 > without.rows(79 * GIB) >= 1
        assert with_checkpoints.rows(14 * GIB) == 0


def test_rows_and_bytes_agree() -> None:
    """The rows that fit need at most the free memory, and one more row needs more."""
    need = Need(1000, 70)
    for free in (1000, 1111, 1200, 5000, 12345):
        rows = need.rows(free)
        assert rows == 0 or need.at(rows) <= free
        assert need.at(rows + 1) > free


def rows_for(
    kept: float, again: float, spec: Any = None, processes: int = 1, most: int | None = None, **given: Any
) -> Any:
    """`rows_and_checkpointing` in a memory that holds `kept` rows, or `again` rows with gradient checkpointing."""
    needs = {False: Need(0, round(900 / kept)), True: Need(0, round(900 / again))}
    hardware = HARDWARE.model_copy(update={"gradient_checkpointing": "auto", **given})
    return memory.rows_and_checkpointing(
        needs.__getitem__, spec or sft_spec(100, 4), hardware, 1000, processes, most
    )


def test_auto_takes_eight_sequences_and_keeps_activations_where_they_fit() -> None:
    assert rows_for(8, 40) == (8, False)
    assert rows_for(100, 400) == (8, False)
    assert rows_for(7, 40) == (8, True)
    assert rows_for(0.5, 3) == (3, True)
    assert rows_for(0.1, 0.5) == (1, True), "at least one; the stage will say that it does not fit"
    assert rows_for(4, 40, dpo_spec(100)) == (4, False), "a pair is two sequences"
    assert rows_for(3, 40, dpo_spec(100)) == (4, True)
    assert rows_for(2, 40, processes=32) == (2, False), "a process takes no more than its share"
    assert rows_for(8, 40, most=8) == (8, True)
    assert rows_for(8, 40, most=2) == (2, True), "after memory ran out"
    # A number in the profile is taken as it is, even if it is too large.
    assert rows_for(8, 40, per_device_batch=16) == (16, True)
    assert rows_for(16, 40, per_device_batch=16) == (16, False)
    assert rows_for(8, 40, per_device_batch=16, gradient_checkpointing=False) == (16, False)
    assert rows_for(3, 40, gradient_checkpointing=False) == (3, False)
    assert rows_for(100, 400, gradient_checkpointing=True) == (8, True)


def test_rows_for_a_model_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """More memory or shorter rows allow more rows. Numbers in the profile are taken as they are."""
    model, spec = make_model(SHAPES[0], torch.float32, 4), sft_spec(100, 4)
    found = []
    monkeypatch.setattr(memory, "HEAD_TOKENS", 64)
    for free, longest in ((0, 100), (14 * 2**20, 100), (14 * 2**20, 50), (10**12, 100)):
        monkeypatch.setattr(memory, "own_device", lambda _, free=free: Device("GPU", True, free, free))
        found.append(memory.training_rows(model, spec, HARDWARE, longest, 1, None)[0])
    assert found[0] == 1 < found[1] < found[2] <= found[3] == memory.SEQUENCES
    given = HARDWARE.model_copy(update={"per_device_batch": 7, "generation_batch": 9})
    assert memory.training_rows(model, spec, given, 100, 1, None) == (7, True)
    assert memory.training_rows(model, spec, given, 100, 1, 3) == (3, True)
    assert memory.generation_batch(model, given, 10, 10) == 9


@pytest.mark.parametrize(("cuda", "most"), [(False, memory.CPU_ROWS), (True, memory.GPU_ROWS)])
def test_generation_batches_are_powers_of_two(cuda: bool, most: int) -> None:
    """A little more free memory in a resumed run does not change the batches."""
    need = Need(0, 9)
    rows = {memory.generation_rows(need, Device("", cuda, free, free)) for free in range(0, 20000, 7)}
    assert rows == {1 << bit for bit in range(most.bit_length())}


def test_memory_of_the_host_is_shared() -> None:
    """Each of two processes on one host has half of its memory."""
    one, two = memory.cpu_device(1), memory.cpu_device(2)
    assert 0 < one.free <= one.total
    assert two.free == pytest.approx(one.free / 2, rel=0.1)


def test_gpt2s_names() -> None:
    """Its settings have names of their own, and the feed-forward layer is four times as wide where it says nothing."""
    older = {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None, "vocab_size": 50257}
    newer = {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
        "vocab_size": 50257,
    }  # fmt: skip
    assert memory.shape_of_config(older, "a") == memory.shape_of_config(newer, "b")


def test_a_config_of_another_kind() -> None:
    """For a model that cannot be estimated, the message says which values to set instead."""
    with pytest.raises(UserError, match=r"x/config\.json: says no num_hidden_layers.*per_device_batch"):
        memory.shape_of_config({"hidden_size": 8, "num_attention_heads": 2}, "x/config.json")
