"""Trains the default model from scratch: a Mistral-shaped network of less than a million parameters.

    pretrain(settings, folder, advance)   ->  folder/{config,tokenizer,record}.json, model.safetensors, ...

It is trained on solutions of generated problems. Some of them hold systematic mistakes, as text from the web does, so
that there is something for SFT and DPO to improve. The folder `base/` beside this file is what `pretrain` once wrote;
its record says from which settings.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from stages.run.errors import UserError
from stages.run.files import read_json, sha256_file, write_json
from stages.run.params import BuiltModel
from stages.tiny.problems import mistaken, problems

RECORD = "record.json"
TOKENIZER_TEXTS = 4000  # the tokenizer is made from the first of the texts
Text = tuple[str, str]  # filled prompt, solution


def pretrain(model: BuiltModel, folder: Path, advance: Callable[[int, str], None]) -> None:
    """Train tokenizer and network into `folder`; `advance(problems, note)` is called after each step.

    The weights are kept in bf16, half the size of what was trained. `record.json` holds the settings and the sha256
    of every other file.
    """
    network, tokenizer = build_model(model, advance)
    network.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    files = {path.name: sha256_file(path) for path in sorted(folder.iterdir()) if path.name != RECORD}
    write_json(folder / RECORD, {"settings": model.model_dump(mode="json"), "files": files})


def recorded_settings(record: Path) -> BuiltModel:
    """The settings from which a model was made. Raises UserError when the file is no record of one."""
    try:
        return BuiltModel.model_validate(read_json(record)["settings"])
    except (KeyError, TypeError, ValidationError) as error:
        raise UserError(
            f"{record}: is no record of a small model ({' '.join(str(error).split()):.200})"
        ) from None


def corpus(model: BuiltModel) -> Iterator[Text]:
    """The pre-training text: distinct problems of the corpus split, in all styles, some solved with mistakes."""
    spec = model.corpus
    rng = random.Random(f"{model.seed}/mistakes")
    for problem in islice(problems("corpus", model.seed), spec.problems):
        style = rng.choices(list(spec.shares), list(spec.shares.values()))[0]
        prompt = spec.prompts[style].replace("{question}", problem.question)
        shares = (spec.confused_share, spec.other_share, spec.slip_share)
        yield prompt, mistaken(problem, style, rng, *shares)


def build_tokenizer(model: BuiltModel, texts: Iterable[Text]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a token. The pad token is not the end token."""
    tokenizer = Tokenizer(models.BPE())
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=model.architecture.vocab,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (prompt + solution for prompt, solution in islice(texts, TOKENIZER_TEXTS)), trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def build_model(
    model: BuiltModel, advance: Callable[[int, str], None]
) -> tuple[MistralForCausalLM, PreTrainedTokenizerFast]:
    """Train tokenizer and network; `advance(problems, note)` is called after each step."""
    texts = list(corpus(model))
    tokenizer = build_tokenizer(model, texts)
    shape, spec = model.architecture, model.corpus
    torch.manual_seed(model.seed)
    network = MistralForCausalLM(
        MistralConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape.hidden,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=shape.context,
            sliding_window=None,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    rows = []
    for prompt, solution in texts:
        before = [tokenizer.bos_token_id, *tokenizer.encode(prompt)]
        rows.append((before, [*tokenizer.encode(solution), tokenizer.eos_token_id]))
    steps = len(rows) // spec.batch
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=spec.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: _warmup_then_decay(n, spec.warmup_steps, steps)
    )
    network.train()
    for input_ids, attention_mask, labels in _batches(rows, spec.batch, tokenizer.pad_token_id, model.seed):
        loss = network(
            input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=False
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        advance(len(input_ids), f"loss {loss.item():.3f}")
    return network.eval(), tokenizer


def _warmup_then_decay(step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return max(0.02, (steps - step) / max(1, steps - warmup))


def _batches(
    rows: list[tuple[list[int], list[int]]], size: int, pad: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Right-padded tokens, mask and labels of rows of similar length, in a shuffled order; no incomplete batch.

    The prompt carries no loss: what the numbers of a story are cannot be learnt.
    """
    rng = random.Random(f"{seed}/batches")
    order = list(range(len(rows)))
    rng.shuffle(order)
    lengths = [len(before) + len(after) for before, after in rows]
    pool = size * 32  # sorting by length within a pool saves padding, and the order stays random
    batches = []
    for start in range(0, len(order), pool):
        chunk = sorted(order[start : start + pool], key=lengths.__getitem__)
        batches += [chunk[i : i + size] for i in range(0, len(chunk) - size + 1, size)]
    rng.shuffle(batches)
    for batch in batches:
        width = max(lengths[i] for i in batch)
        input_ids, labels = torch.full((size, width), pad), torch.full((size, width), -100)
        mask = torch.zeros((size, width), dtype=torch.long)
        for row, i in enumerate(batch):
            before, after = rows[i]
            input_ids[row, : lengths[i]] = torch.tensor(before + after)
            labels[row, len(before) : lengths[i]] = torch.tensor(after)
            mask[row, : lengths[i]] = 1
        yield input_ids, mask, labels
