"""Training on a small random Mistral: the rows, what is trained, where DPO starts, and what is saved."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Mapping
from itertools import chain, pairwise
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, SFTConfig
from trl.trainer import utils as trl_utils
from trl.trainer.utils import use_adapter

from stages import sft
from stages.engine.load import engine_around
from stages.policy import adapter as policy_adapter
from stages.policy.adapter import (
    adapter_config,
    adapter_weights,
    load_base,
    load_policy,
    read_adapter,
    save_adapter,
)
from stages.policy.request import Completion, Request
from stages.run.errors import UserError
from stages.run.files import read_json, read_jsonl, write_jsonl
from stages.run.params import Dpo, Lora, Prompt, load_params
from stages.run.paths import BASE, LAST, ROOT, TRAIN, VALID
from stages.run.resume import COMPLETE, newest_checkpoint
from stages.text.prompts import completion_ids, prompt_ids
from stages.train.pair_trainer import (
    PairTrainer,
    assert_reference,
    assert_same_start,
    set_reference,
)
from stages.train.pairs import build_rows, pair_length
from stages.train.selection import Selection
from stages.train.trainer import (
    InputsAsTheyAre,
    Rows,
    assert_trainable,
    total_steps,
    trainer_arguments,
    training_order,
    training_set,
)
from tests.policy import SMALL, random_base

PROMPT = Prompt(
    chat=False,
    default="plain",
    styles={"plain": "Question: {question}\nAnswer:\n", "short": "{question}\nShort answer:\n"},
    completion="{solution}",
)
TRAINING = {"batch": 4, "learning_rate": 1e-2, "warmup_ratio": 0.0, "max_tokens": 80, "checkpoint_steps": 100}
LORA = Lora(r=4, alpha=8, dropout=0.05)
SFT = load_params(SMALL).sft.model_copy(
    update={**TRAINING, "examples": None, "styles": ["plain", "short"], "lora": LORA}
)
DPO = load_params(SMALL).dpo.model_copy(update=TRAINING)
LOSSES: tuple[dict[str, float], ...] = (
    {"sigmoid": 1.0}, {"sigmoid_norm": 1.0}, {"ipo": 1.0}, {"sft": 1.0}, {"sigmoid": 1.0, "sft": 0.5},
)  # fmt: skip
TWO_ROWS = Rows(micro_batch=2, accumulation=2, checkpointing=False)
PROBLEMS = [
    {"question": f"Ann has {a} pens and gets {b}. How many?", "solution": f"{a}+{b}={a + b}.\n#### {a + b}"}
    for a, b in [(1, 3), (2, 2), (3, 1), (1, 4), (2, 3), (3, 2), (4, 1), (5, 5)]
]
TOO_LONG = {"question": "Why? " * 100, "solution": "#### 1"}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
TEXTS = [f"{row['question']} {row['solution']} Question: Answer: Short answer:" for row in PROBLEMS]


def byte_level() -> PreTrainedTokenizerFast:
    """Like that of the embedded model, but a token may hold the end of a line and what follows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **SPECIAL)


def llama() -> PreTrainedTokenizerFast:
    """Like those of Llama 2 and Abel: `▁` stands for a space, and one is put before every text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<pad>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator([word for text in TEXTS for word in [*text.split(), "\n"]], trainer)
    decoder = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(decoder)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **SPECIAL)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base model and its tokenizer, saved as the base stage does."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = byte_level()
    random_base(
        0, vocab_size=len(tokenizer), hidden_size=32, max_position_embeddings=128, initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def project(tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A run with typed parameters, in a folder with training problems and pairs."""
    monkeypatch.chdir(tmp_path)
    BASE.parent.mkdir()
    BASE.symlink_to(base_folder)  # where PEFT looks for the base model's config
    for path, rows in {
        TRAIN: [*PROBLEMS, TOO_LONG],
        LAST.pairs: [
            {"prompt": row["question"], "chosen": row["solution"], "rejected": "#### 7", "rejected_finish": end}
            for row, end in zip(PROBLEMS, ["stop", "length"] * 4, strict=True)
        ],
    }.items():  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return SimpleNamespace(
        params=SimpleNamespace(sft=SFT, dpo=DPO, prompt=PROMPT, seed=3), work=tmp_path / "work"
    )


def fresh_adapter(base_folder: Path) -> tuple[Any, Any]:
    """A base model with a new LoRA adapter, and its tokenizer."""
    model, tokenizer = load_base(base_folder)
    spec = SFT.lora
    lora = LoraConfig(
        r=spec.r, lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(1)
    return get_peft_model(model, lora), tokenizer


def sft_trainer(project: SimpleNamespace, base_folder: Path, at_once: Rows = TWO_ROWS) -> Any:
    """The trainer of the SFT stage on the project's problems."""
    model, tokenizer = fresh_adapter(base_folder)
    rows, _ = sft.build_rows(project, tokenizer)
    arguments = trainer_arguments(SFT, 3, model, at_once, project.work) | {"save_strategy": "no"}
    lengths = [len(row["input_ids"]) for row in rows]
    return sft.RowTrainer(
        model=model,
        args=SFTConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=training_set(rows, lengths, SFT, 3),
        processing_class=tokenizer,
    )


def train_sft(project: SimpleNamespace, base_folder: Path) -> Any:
    """The model after one epoch of SFT, with its adapter."""
    trainer = sft_trainer(project, base_folder)
    trainer.train()
    return trainer.model


@pytest.fixture
def sft_adapter(project: SimpleNamespace, base_folder: Path, tmp_path: Path) -> Path:
    """An adapter that changes the model, saved as the SFT stage does."""
    model, _ = fresh_adapter(base_folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_adapter(adapter_weights(model), adapter_config(model), folder)
    return folder


def dpo_trainer(
    project: SimpleNamespace,
    base_folder: Path,
    adapter: Path,
    losses: Mapping[str, float] = MappingProxyType({"sigmoid": 1.0}),
    at_once: Rows = TWO_ROWS,
) -> tuple[Any, list[dict[str, list[int]]]]:
    """The trainer of the DPO stage on the project's pairs, and the pairs as tokens."""
    model, tokenizer = load_policy(adapter, base_folder, trainable=True)
    rows, _ = build_rows(LAST.pairs, DPO.max_tokens, PROMPT, tokenizer)
    arguments = trainer_arguments(DPO, 3, model, at_once, project.work) | {"save_strategy": "no"}
    trainer = PairTrainer(
        model=model,
        args=DPOConfig(
            **arguments, beta=DPO.beta, loss_type=list(losses), loss_weights=list(losses.values())
        ),
        train_dataset=training_set(rows, [pair_length(row) for row in rows], DPO, 3),
        processing_class=tokenizer,
    )
    return trainer, rows


def without_dropout(model: Any) -> None:
    """Switch the model's dropout off."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


# ---- Rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [byte_level, llama])
def test_an_sft_row_is_prompt_solution_and_end_token(make: Any, project: SimpleNamespace) -> None:
    """The prompt is the very one of generation and has no loss. The solution and the end token have loss."""
    tokenizer = make()
    rows, too_long = sft.build_rows(project, tokenizer)
    assert (len(rows), too_long) == (len(PROBLEMS), 1)
    styles = set()
    for row, problem in zip(rows, PROBLEMS, strict=True):
        ids, border = row["input_ids"], row["labels"].count(-100)
        asked = {style: prompt_ids(tokenizer, PROMPT, problem["question"], style) for style in SFT.styles}
        styles |= {style for style, prompt in asked.items() if prompt == ids[:border]}
        assert border > 5
        assert row["labels"] == [-100] * border + ids[border:]
        assert tokenizer.decode(ids[border:-1]) == problem["solution"]
        assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    assert styles == set(SFT.styles)


def test_a_completion_starts_without_a_space() -> None:
    """Llama's tokenizers put one before every text. After the prompt's line break the model would learn it."""
    tokenizer = llama()
    ids = completion_ids(tokenizer, "Ann has 4", ended=False)
    assert not tokenizer.convert_ids_to_tokens(ids)[0].startswith("▁")
    prompt = prompt_ids(tokenizer, PROMPT, "How many?")
    together = tokenizer("Question: How many?\nAnswer:\nAnn has 4", add_special_tokens=False)["input_ids"]
    assert [*prompt, *ids] == [tokenizer.bos_token_id, *together]


def test_the_opening_is_in_the_prompts_tokens_and_not_in_the_completions() -> None:
    """R1's chat template writes `<think>`. Records show it in the answer, whose tokens must not repeat it."""
    tokenizer = byte_level()
    thought = "4.\n</think>\n\n#### 4"
    ids = completion_ids(tokenizer, "<think>\n" + thought, opening="<think>\n")
    assert ids == completion_ids(tokenizer, thought)
    assert tokenizer.decode(ids, skip_special_tokens=True) == thought
    prompt = Prompt(
        chat=True, opening="<think>\n", default="plain", styles={"plain": "{question}"},
        completion="<think>\n{steps}\n</think>\n\n{solution}",
    )  # fmt: skip
    tokenizer.chat_template = (
        "{{ bos_token }}User: {{ messages[0]['content'] }} Assistant: {{ '<think>\\n' }}"
    )
    filled = prompt_ids(tokenizer, prompt, "How many?")
    assert tokenizer.decode(filled) == "<s>User: How many? Assistant: <think>\n"
    tokenizer.chat_template = "{{ bos_token }}User: {{ messages[0]['content'] }} Assistant: "
    with pytest.raises(UserError, match=r"prompt\.opening: the chat template does not end in '<think>"):
        prompt_ids(tokenizer, prompt, "How many?")


def test_a_rejected_text_that_was_cut_off_has_no_end(project: SimpleNamespace) -> None:
    """The policy wrote no end token there, so DPO must not make one less likely."""
    tokenizer = byte_level()
    rows, too_long = build_rows(LAST.pairs, DPO.max_tokens, PROMPT, tokenizer)
    assert (len(rows), too_long) == (8, 0)
    assert all(row["chosen_ids"][-1] == tokenizer.eos_token_id for row in rows)
    ended = [row["rejected_ids"][-1] == tokenizer.eos_token_id for row in rows]
    assert ended == [True, False] * 4


# ---- What is trained -----------------------------------------------------------------------------------


def test_exactly_the_adapter_must_be_trainable(base_folder: Path, sft_adapter: Path) -> None:
    """All of it, on all seven linear layers of each block. An adapter loaded for inference would train nothing."""
    model, _ = fresh_adapter(base_folder)
    hidden, key_value, ffn, r = 32, 16, 64, SFT.lora.r
    shapes = [(hidden, hidden)] * 2 + [(hidden, key_value)] * 2 + [(hidden, ffn)] * 3
    assert assert_trainable(model) == 2 * sum(r * (a + b) for a, b in shapes)
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="embed_tokens"):
        assert_trainable(model)
    frozen, _ = load_policy(sft_adapter, base_folder, trainable=False)
    with pytest.raises(RuntimeError, match="found nothing"):
        assert_trainable(frozen)


def test_the_order_of_training() -> None:
    """Each epoch has every row, the first ones twice to fill the last batch, and its own order by seed."""
    order = training_order(5, 4, 2, 17)
    assert [sorted(order[at : at + 8]) for at in (0, 8)] == [[0, 0, 1, 1, 2, 2, 3, 4]] * 2
    assert order[:8] != order[8:] and order == training_order(5, 4, 2, 17)
    assert order != training_order(5, 4, 2, 18)
    assert training_order(1, 3, 1, 17) == [0, 0, 0]
    assert total_steps(9, SFT) == 3


WHOLE, HALVES, SINGLE = Rows(4, 1, False), Rows(2, 2, False), Rows(1, 4, False)


def passes(trainer: Any) -> list[list[list[int]]]:
    """The lengths of the rows in each pass of each step."""
    count, key = trainer.args.gradient_accumulation_steps, "input_ids"
    pad = trainer.processing_class.pad_token_id
    lengths = [batch[key].ne(pad).sum(1).tolist() for batch in trainer.get_train_dataloader()]
    return [lengths[at : at + count] for at in range(0, len(lengths), count)]


def test_passes_take_as_many_tokens_and_a_step_its_rows(project: SimpleNamespace, base_folder: Path) -> None:
    """A batch taken at once keeps its order. Else a long row may stand alone beside three short ones."""
    first = PROBLEMS[0]
    long = {**first, "solution": "1+1=2. " * 7 + first["solution"]}
    TRAIN.write_text("".join(json.dumps(row) + "\n" for row in [*PROBLEMS[:7], long]), encoding="utf-8")
    whole, halves = (passes(sft_trainer(project, base_folder, at_once)) for at_once in (WHOLE, HALVES))
    assert [sorted(chain(*step)) for step in halves] == [sorted(chain(*step)) for step in whole]
    rows = sft.build_rows(project, byte_level())[0]
    order = training_order(len(rows), SFT.batch, SFT.epochs, 3)
    assert [length for (one,) in whole for length in one] == [
        len(rows[place]["input_ids"]) for place in order
    ]
    longest = max(chain(*chain(*halves)))
    (with_long,) = [step for step in halves if longest in chain(*step)]
    assert sorted(len(one) for one in with_long) == [1, 3]


@pytest.mark.parametrize("losses", [{}, *LOSSES], ids=lambda losses: "+".join(losses) or "phase sft")
def test_the_rows_of_a_pass_change_nothing_that_is_learned(
    project: SimpleNamespace, base_folder: Path, sft_adapter: Path, losses: dict[str, float]
) -> None:
    """A whole batch at once, passes of unequal numbers of rows, and one row at a time learn the same."""
    logged, adapters = [], []
    for at_once in (WHOLE, HALVES, SINGLE):
        trainer: Any
        if not losses:
            trainer = sft_trainer(project, base_folder, at_once)
        else:
            trainer, _ = dpo_trainer(project, base_folder, sft_adapter, losses, at_once)
        without_dropout(trainer.model)  # what it drops depends on the rows of a pass
        trainer.train()
        logged.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        adapters.append(adapter_weights(trainer.model))
    assert len(logged[0]) == total_steps(len(PROBLEMS), SFT) > 1
    for other, adapter in zip(logged[1:], adapters[1:], strict=True):
        assert other == pytest.approx(logged[0], rel=1e-4)
        for name, weight in adapters[0].items():
            torch.testing.assert_close(adapter[name], weight, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("phase", ["sft", "dpo"])
def test_rows_end_to_end_learn_what_padded_rows_learn(
    project: SimpleNamespace,
    base_folder: Path,
    sft_adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
    phase: str,
    kernel: bool,
) -> None:
    """bench/padding_free.py, with the mask of a CPU, and with a stand-in for the kernel that only a GPU has."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    padding_free = importlib.import_module("padding_free")
    borders_seen = []

    def stand_in(
        query: Any, key: Any, value: Any, borders: Any, borders_k: Any, *longest: int, **how: Any
    ) -> Any:
        assert how["window_size"] == (-1, 0) and how["enable_gqa"]
        assert torch.equal(borders, borders_k) and borders.dtype == torch.int32
        assert longest == (int(borders.diff().max()),) * 2 and borders[-1] == len(query) == len(key)
        borders_seen.append(borders.tolist())
        parts = [
            torch.nn.functional.scaled_dot_product_attention(
                *(one[a:b].transpose(0, 1)[None] for one in (query, key, value)),
                is_causal=True, scale=how["scale"], enable_gqa=True,
            )[0].transpose(0, 1)
            for a, b in pairwise(borders.tolist())
        ]  # fmt: skip
        return torch.cat(parts)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    losses, adapters = [], []
    for without in (False, True):
        trainer: Any
        if phase == "sft":
            trainer = sft_trainer(project, base_folder)
        else:
            trainer, _ = dpo_trainer(project, base_folder, sft_adapter, {"sigmoid": 1.0, "sft": 0.5})
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # what it drops depends on where a token lies
        widths = []
        if without:
            padding_free.without_padding(trainer.model)
            if kernel:
                padding_free.use_kernel(trainer.model)
            layer = trainer.model.get_base_model().base_model.layers[0]
            layer.register_forward_pre_hook(lambda _, given, seen=widths: seen.append(given[0].shape[:2]))
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        adapters.append(adapter_weights(trainer.model))
    assert widths and all(rows == 1 for rows, _ in widths)
    assert bool(borders_seen) == kernel
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for name, weight in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], weight, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("phase", ["sft", "dpo"])
def test_inputs_as_they_are_change_no_number(
    project: SimpleNamespace,
    base_folder: Path,
    sft_adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    phase: str,
) -> None:
    """The adapter's layers take bf16 in place of 32 bits, and learn the same to the last bit."""
    monkeypatch.setattr(policy_adapter, "computes_bf16", lambda: True)
    half = tmp_path / "half"
    model, tokenizer = load_base(base_folder)
    model.to(torch.bfloat16).save_pretrained(half)
    tokenizer.save_pretrained(half)
    given: list[set[torch.dtype]] = []
    learned = []
    for way in ("as they are", "as PEFT does"):
        if way == "as PEFT does":
            monkeypatch.delattr(InputsAsTheyAre, "training_step")
        trainer = sft_trainer(project, half) if phase == "sft" else dpo_trainer(project, half, sft_adapter)[0]
        assert trainer.args.bf16
        seen: set[torch.dtype] = set()
        given.append(seen)
        without_dropout(trainer.model)  # a CPU draws other numbers in another precision
        for module in trainer.model.modules():
            if isinstance(module, LoraLayer):
                module.lora_A["default"].register_forward_pre_hook(
                    lambda layer, inputs, seen=seen: seen.add(inputs[0].dtype)
                )
        trainer.train()
        learned.append(adapter_weights(trainer.model))
        with torch.no_grad():  # afterwards, and without autocast, the model is as usable as before
            trainer.model(input_ids=torch.tensor([[3, 4, 5]]))
    assert given == [{torch.bfloat16, torch.float32}, {torch.float32}]  # 32 bits are of the call afterwards
    assert learned[0].keys() == learned[1].keys()
    assert all(torch.equal(weight, learned[1][name]) for name, weight in learned[0].items())


# ---- Where DPO starts ----------------------------------------------------------------------------------


def test_dpo_starts_at_its_reference_which_does_not_move(
    project: SimpleNamespace, base_folder: Path, sft_adapter: Path
) -> None:
    """Policy and reference are the SFT adapter at step 0 (loss log 2); only the policy moves."""
    trainer, rows = dpo_trainer(project, base_folder, sft_adapter)
    assert assert_trainable(trainer.model) == sum(w.numel() for w in read_adapter(sft_adapter).values())
    assert_reference(trainer.model, sft_adapter)
    assert_same_start(trainer, rows)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert_reference(trainer.model, sft_adapter)
    saved, now = read_adapter(sft_adapter), adapter_weights(trainer.model)
    assert saved.keys() == now.keys()
    assert all(not torch.equal(saved[name], now[name]) for name in saved)
    with pytest.raises(RuntimeError, match="must start at its reference"):
        assert_same_start(trainer, rows)


def test_step_0_is_scored_in_the_arithmetic_of_later_steps(
    project: SimpleNamespace,
    base_folder: Path,
    sft_adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Training wraps the forward pass of the model in autocast for good; what is generated stays the same."""
    monkeypatch.setattr(policy_adapter, "computes_bf16", lambda: True)
    half = tmp_path / "half"
    model, tokenizer = load_base(base_folder)
    model.to(torch.bfloat16).save_pretrained(half)
    tokenizer.save_pretrained(half)
    trainer, rows = dpo_trainer(project, half, sft_adapter)
    trainer.args.learning_rate = 0.0
    hardware = load_params(SMALL).hardware
    requests = [Request(str(i), tuple(row["prompt_ids"]), 20, i % 2, seed=i) for i, row in enumerate(rows)]

    def answers() -> list[Completion]:
        engine = engine_around(trainer.model, trainer.processing_class, hardware)
        return sorted(engine.generate(requests), key=lambda one: one.id)

    before = answers()
    trainer.train()
    assert trainer.args.bf16 and "_original_forward" in vars(trainer.model)
    assert answers() == before


def test_the_start_is_compared_on_one_pair_without_the_logits(
    project: SimpleNamespace, base_folder: Path, sft_adapter: Path
) -> None:
    """The logits of a whole pair are more than a training step holds of them."""
    trainer, rows = dpo_trainer(project, base_folder, sft_adapter)
    given, logits = [], []
    with pytest.MonkeyPatch.context() as patch:
        collate = trainer.data_collator
        patch.setattr(trainer, "data_collator", lambda rows: given.append(len(rows)) or collate(rows))
        trainer.model.get_output_embeddings().register_forward_hook(lambda *_: logits.append(1))
        assert_same_start(trainer, rows)
    assert (given, logits) == ([1], [])


def test_a_reference_that_moved_is_found(
    project: SimpleNamespace, base_folder: Path, sft_adapter: Path
) -> None:
    """Even if one number of one tensor moved by a thousandth."""
    trainer, _ = dpo_trainer(project, base_folder, sft_adapter)
    name, weight = next((n, w) for n, w in trainer.model.named_parameters() if ".ref." in n and "lora_B" in n)
    with torch.no_grad():
        weight[0, 0] += 1e-3
    with pytest.raises(RuntimeError, match=r"reference is not .*adapter: ") as found:
        assert_reference(trainer.model, sft_adapter)
    assert name.split(".ref.")[0] in str(found.value)


def test_a_later_round_may_have_sft_as_its_reference(
    project: SimpleNamespace, base_folder: Path, sft_adapter: Path, tmp_path: Path
) -> None:
    """Its policy starts where the round before ended, and its reference is SFT, which does not move."""
    first, _ = dpo_trainer(project, base_folder, sft_adapter)
    first.train()
    start = tmp_path / "round1"
    start.mkdir()
    save_adapter(adapter_weights(first.model), adapter_config(first.model), start)
    trainer, rows = dpo_trainer(project, base_folder, start)
    assert_reference(trainer.model, start)
    assert_same_start(trainer, rows)
    set_reference(trainer.model, sft_adapter)
    with pytest.raises(RuntimeError, match="reference is not"):
        assert_reference(trainer.model, start)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] != pytest.approx(0.693147, abs=1e-3)
    assert_reference(trainer.model, sft_adapter)
    policy, saved = adapter_weights(trainer.model), read_adapter(start)
    assert all(not torch.equal(saved[name], policy[name]) for name in saved)


# ---- Losses --------------------------------------------------------------------------------------------


def of_a_side(model: Any, row: dict[str, list[int]], side: str, reference: bool = False) -> tuple[float, int]:
    """log p(completion | prompt) by the plain forward pass, and the completion's tokens."""
    ids, border = row["prompt_ids"] + row[side], len(row["prompt_ids"])
    with torch.no_grad(), use_adapter(model, "ref" if reference else "default"):
        logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    wanted = torch.tensor(ids[1:])[:, None]
    return logprobs.gather(1, wanted)[border - 1 :].sum().item(), len(row[side])


def by_the_papers(model: Any, rows: list[dict[str, list[int]]], losses: dict[str, float]) -> float:
    """The mean loss of some pairs, written down from the papers.

    sigmoid: Rafailov et al. 2023 (arXiv 2305.18290), equation 7. sigmoid_norm: Lambert et al. 2024 (Tülu 3,
    arXiv 2411.15124), equation 6. ipo: Azar et al. 2023 (arXiv 2310.12036), equation 17, of means over tokens.
    sft: Pang et al. 2024 (arXiv 2404.19733), the second term of equation 2.
    """
    total = 0.0
    for row in rows:
        (chosen, c), (rejected, r) = (of_a_side(model, row, side) for side in ("chosen_ids", "rejected_ids"))
        chosen_ref = of_a_side(model, row, "chosen_ids", reference=True)[0]
        rejected_ref = of_a_side(model, row, "rejected_ids", reference=True)[0]
        margin = (chosen - chosen_ref) - (rejected - rejected_ref)
        mean_margin = (chosen - chosen_ref) / c - (rejected - rejected_ref) / r
        values = {
            "sigmoid": math.log1p(math.exp(-DPO.beta * margin)),
            "sigmoid_norm": math.log1p(math.exp(-DPO.beta * mean_margin)),
            "ipo": (mean_margin - 1 / (2 * DPO.beta)) ** 2,
            "sft": -chosen / c,
        }
        total += sum(weight * values[name] for name, weight in losses.items())
    return total / len(rows)


@pytest.mark.parametrize("losses", LOSSES, ids="+".join)
def test_each_loss_is_that_of_its_paper_at_every_step(
    project: SimpleNamespace, base_folder: Path, sft_adapter: Path, losses: dict[str, float]
) -> None:
    """In two steps, the second of which finds a policy that has left its reference. Completions differ in length."""
    pairs = list(read_jsonl(LAST.pairs, {"chosen": str}))
    for at, pair in enumerate(pairs):
        pair["chosen"] = "1+1=2. " * (at % 3) + pair["chosen"]
    write_jsonl(LAST.pairs, pairs)
    trainer, rows = dpo_trainer(project, base_folder, sft_adapter, losses, WHOLE)
    without_dropout(trainer.model)
    order = training_order(len(rows), DPO.batch, DPO.epochs, 3)
    wanted = []

    class Formula(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            at = state.global_step * DPO.batch
            batch = [rows[place] for place in order[at : at + DPO.batch]]
            wanted.append(by_the_papers(trainer.model, batch, losses))

    trainer.add_callback(Formula())
    trainer.train()
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(wanted) == 2 and wanted[0] != pytest.approx(wanted[1], rel=1e-3)
    assert logged == pytest.approx(wanted, rel=1e-4)


def test_every_loss_that_a_profile_may_name_is_among_them() -> None:
    """So that none is offered that was never run."""
    (names,) = get_args(Dpo.model_fields["loss_type"].annotation)
    assert set(get_args(names)) == set(chain(*LOSSES))


def test_sft_alone_computes_the_chosen_answers_and_nothing_else(
    project: SimpleNamespace, base_folder: Path, sft_adapter: Path
) -> None:
    """No rejected answer, no reference, and no padding for a longer rejected one."""
    trainer, rows = dpo_trainer(project, base_folder, sft_adapter, {"sft": 1.0}, WHOLE)
    row = rows[0] | {"rejected_ids": rows[0]["rejected_ids"] * 9}
    batch = trainer._prepare_inputs(trainer.data_collator([row]))
    given = []
    trainer.model.get_input_embeddings().register_forward_hook(
        lambda layer, inputs, output: given.append(tuple(inputs[0].shape))
    )
    trainer.compute_loss(trainer.model, batch)
    assert given == [(1, len(row["prompt_ids"]) + len(row["chosen_ids"]))]
    assert batch["input_ids"].shape[1] > given[0][1]


@pytest.mark.parametrize("phase", ["sft", "dpo"])
def test_the_output_layer_sees_no_prompt(
    project: SimpleNamespace,
    base_folder: Path,
    sft_adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
    phase: str,
) -> None:
    """TRL by itself gives it every token on a processor, and the prompts are most of them."""
    function, given = trl_utils._ChunkedLogProbFunction, []
    apply = function.apply

    def counted(hidden: torch.Tensor, *args: Any) -> Any:
        given.append(len(hidden))
        return apply(hidden, *args)

    monkeypatch.setattr(function, "apply", counted)
    trainer: Any
    if phase == "sft":
        trainer = sft_trainer(project, base_folder, SINGLE)
        batch = next(iter(trainer.get_train_dataloader()))
        wanted = [int((batch["labels"] != -100).sum())]
    else:
        trainer, _ = dpo_trainer(project, base_folder, sft_adapter, at_once=SINGLE)
        batch = next(iter(trainer.get_train_dataloader()))
        wanted = [int(batch["completion_mask"].sum())] * 2  # of the policy and of its reference
    trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
    assert given == wanted and wanted[0] < batch["input_ids"].numel() / 2


# ---- Which step is kept --------------------------------------------------------------------------------


def select(project: SimpleNamespace, trainer: Any, engine_of: Callable[[Any], Any], **over: Any) -> Selection:
    """The selection of the SFT stage, after training. Every problem's gold is 7."""
    write_jsonl(VALID, [{"id": str(i), "gold": "7", **row} for i, row in enumerate(PROBLEMS)])
    spec = SFT.select.model_copy(update={"questions": len(PROBLEMS), "steps": 1, **over})
    project.params.sft = SFT.model_copy(update={"select": spec})
    selection = Selection(project, "sft", trainer.processing_class, adapter_config(trainer.model), engine_of)
    selection.train(trainer, None)
    return selection


def real_engine(model: Any) -> Any:
    return engine_around(model, byte_level(), load_params(SMALL).hardware)


class Answers:
    """An engine that answers so many requests rightly at each look, and none at the first one."""

    def __init__(self, right: list[int]) -> None:
        self.right, self.seen = [0, *right], [dict[str, torch.Tensor]()]

    def __call__(self, model: Any) -> Answers:
        self.seen.append(adapter_weights(model))
        return self

    def generate(self, requests: list[Request]) -> list[Completion]:
        tokens = [byte_level()(f"#### {answer}", add_special_tokens=False)["input_ids"] for answer in (7, 8)]
        right = self.right[len(self.seen) - 2]
        return [
            Completion(request.id, tuple(tokens[place >= right]), "stop", 0.0)
            for place, request in enumerate(requests)
        ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_zero_step_answers_as_the_base_and_can_be_trained(
    project: SimpleNamespace, base_folder: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    """No answer is right, so SFT keeps step 0: B is zero, A is not, and each answer is the base's."""
    base = tmp_path / "base"
    model, tokenizer = load_base(base_folder)
    model.to(dtype).save_pretrained(base)
    tokenizer.save_pretrained(base)
    trainer = sft_trainer(project, base)
    adapter, curve, kept = tmp_path / "zero", tmp_path / "curve.csv", tmp_path / "kept.json"
    judged = select(project, trainer, real_engine).write(adapter, curve, kept, "the base policy")
    assert (judged["kept"], judged["looks"], judged["last"]) == (0, 2, 2)
    assert read_json(kept) == judged and judged["start"] == "the base policy"
    assert [line.split(",")[0] for line in curve.read_text().splitlines()] == ["step", "0", "1", "2"]
    trained, weights = adapter_weights(trainer.model), read_adapter(adapter)
    for name, weight in weights.items():
        assert bool(weight.any()) == ("lora_A" in name)
        assert not torch.equal(weight, trained[name])

    requests = [
        Request(str(i), tuple(prompt_ids(tokenizer, PROMPT, row["question"])), 20, i % 2, seed=i)
        for i, row in enumerate(PROBLEMS)
    ]

    def answers(folder: Path | None) -> list[Completion]:
        return sorted(real_engine(load_policy(folder, base)[0]).generate(requests), key=lambda one: one.id)

    for one, other in zip(answers(adapter), answers(None), strict=True):
        assert one.tokens == other.tokens
        assert one.logprob == pytest.approx(other.logprob, rel=1e-6)  # rounding; stages fix MKL's (MKL_CBWR)
    further, _ = dpo_trainer(project, base, adapter)
    further.train()
    assert all(weight.any() for weight in adapter_weights(further.model).values())


def test_the_best_step_is_kept_where_the_test_supports_it(
    project: SimpleNamespace, base_folder: Path, tmp_path: Path
) -> None:
    """Of 0, 8 and 5 right answers step 1 is the best: eight changes for the better, p = 2 / 2^8."""
    for level, wanted in ((0.01, 1), (0.005, 0)):
        project.work = tmp_path / str(level)
        answers = Answers([8, 5])
        selection = select(project, sft_trainer(project, base_folder), answers, samples=0, level=level)
        judged = selection.write(
            tmp_path / "kept", tmp_path / "c.csv", tmp_path / "k.json", "the base policy"
        )
        assert (judged["kept"], judged["p"]) == (wanted, 2 / 2**8)
        saved = read_adapter(tmp_path / "kept")
        assert all(torch.equal(saved[name], weight) for name, weight in answers.seen[1 + wanted].items())


def test_looks_change_nothing_that_is_learned(project: SimpleNamespace, base_folder: Path) -> None:
    """Not even what dropout drops: else a run that was killed between a look and a checkpoint would learn otherwise."""
    assert SFT.lora.dropout > 0
    adapters = []
    for steps in (1, 100):
        project.work = project.work.with_name(f"every-{steps}")
        trainer = sft_trainer(project, base_folder)
        selection = select(project, trainer, real_engine, steps=steps)
        adapters.append((adapter_weights(trainer.model), len(selection.rows)))
    (often, looks), (seldom, few) = adapters
    assert (looks, few) == (3, 2)
    assert all(torch.equal(weight, seldom[name]) for name, weight in often.items())


# ---- What is saved -------------------------------------------------------------------------------------


def test_a_saved_adapter_gives_the_logits_of_training(
    project: SimpleNamespace, base_folder: Path, tmp_path: Path
) -> None:
    """It is applied unmerged, the logits agree to 1e-5, and they differ from those of the base model."""
    model = train_sft(project, base_folder).eval()
    folder = tmp_path / "saved"
    folder.mkdir()
    save_adapter(adapter_weights(model), adapter_config(model), folder)
    assert {file.name for file in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    loaded, tokenizer = load_policy(folder, base_folder)
    plain, _ = load_policy(None, base_folder)
    layers = [layer for layer in loaded.modules() if isinstance(layer, LoraLayer)]
    assert len(layers) == 14
    assert not any(layer.merged for layer in layers)
    assert not loaded.training
    ids = torch.tensor([prompt_ids(tokenizer, PROMPT, PROBLEMS[0]["question"])])
    with torch.no_grad():
        trained, reloaded, without = (one(input_ids=ids).logits for one in (model, loaded, plain))
    assert torch.allclose(trained, reloaded, atol=1e-5, rtol=0)
    assert (trained - without).abs().max() > 0.1


def test_adapter_config_is_the_same_everywhere(base_folder: Path, sft_adapter: Path, tmp_path: Path) -> None:
    """PEFT keeps its modules in a set, whose order changes from run to run, and it notes the path of the base."""
    model, _ = fresh_adapter(base_folder)
    config = adapter_config(model)
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["base_model_name_or_path"] == "checkpoints/base"
    assert str(base_folder) not in json.dumps(config)
    loaded, _ = load_policy(sft_adapter, base_folder, trainable=True)
    assert adapter_config(loaded) == config == json.loads((sft_adapter / "adapter_config.json").read_text())
    again = tmp_path / "again"
    again.mkdir()
    save_adapter(adapter_weights(loaded), adapter_config(loaded), again)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (again / file).read_bytes() == (sft_adapter / file).read_bytes()


def test_resuming_takes_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    """Steps compare as numbers. Incomplete checkpoints are deleted, and so are older complete ones.

    A kill while the trainer was deleting an old one can leave it half deleted, and it would look like the youngest.
    """
    assert newest_checkpoint(tmp_path) is None
    for step, complete in ((9, True), (10, True), (11, False)):
        folder = tmp_path / "trainer" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "model.bin").write_bytes(b"half")
        if complete:
            (folder / COMPLETE).touch()
    assert newest_checkpoint(tmp_path) == tmp_path / "trainer" / "checkpoint-10"
    assert [folder.name for folder in (tmp_path / "trainer").iterdir()] == ["checkpoint-10"]
