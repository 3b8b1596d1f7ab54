"""Trains the default model from scratch: a Mistral-shaped network of about a million parameters.

It is pre-trained on generated problems. Some of their solutions hold systematic mistakes, as text from the web does,
so that there is something for SFT and DPO to improve.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import islice

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from stages.run.params import BuiltModel
from stages.tiny.problems import Style, mistaken, problems

Text = tuple[str, str]  # filled prompt, solution


def corpus(model: BuiltModel) -> list[Text]:
    """The pre-training text: distinct problems of the corpus split, in both styles, some with mistakes."""
    spec = model.corpus
    rng = random.Random(f"{model.seed}/mistakes")
    texts = []
    for problem in islice(problems("corpus", model.seed), spec.problems):
        style: Style = "direct" if rng.random() < spec.direct_share else "plain"
        prompt = spec.prompts[style].replace("{question}", problem.question)
        texts.append((prompt, mistaken(problem, style, rng, spec.confused_share, spec.slip_share)))
    return texts


def build_tokenizer(model: BuiltModel, texts: list[Text]) -> PreTrainedTokenizerFast:
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
    tokenizer.train_from_iterator((prompt + solution for prompt, solution in texts[:4000]), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def build_model(
    model: BuiltModel, advance: Callable[[int, str], None]
) -> tuple[MistralForCausalLM, PreTrainedTokenizerFast]:
    """Train tokenizer and network; `advance(problems, note)` is called after each step."""
    texts = corpus(model)
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
    rows = [
        [
            tokenizer.bos_token_id,
            *tokenizer.encode(prompt),
            *tokenizer.encode(solution),
            tokenizer.eos_token_id,
        ]
        for prompt, solution in texts
    ]
    steps = len(rows) // spec.batch
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=spec.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: _warmup_then_decay(n, spec.warmup_steps, steps)
    )
    network.train()
    for input_ids, attention_mask in _batches(rows, spec.batch, tokenizer.pad_token_id, model.seed):
        labels = input_ids.masked_fill(attention_mask == 0, -100)
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
    rows: list[list[int]], size: int, pad: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Right-padded batches of rows of similar length, in a shuffled order. The last incomplete batch is left out."""
    rng = random.Random(f"{seed}/batches")
    order = list(range(len(rows)))
    rng.shuffle(order)
    pool = size * 32  # sorting by length within a pool saves padding, and the order stays random
    batches = []
    for start in range(0, len(order), pool):
        chunk = sorted(order[start : start + pool], key=lambda i: len(rows[i]))
        batches += [chunk[i : i + size] for i in range(0, len(chunk) - size + 1, size)]
    rng.shuffle(batches)
    for batch in batches:
        width = max(len(rows[i]) for i in batch)
        input_ids = torch.full((size, width), pad)
        mask = torch.zeros((size, width), dtype=torch.long)
        for row, i in enumerate(batch):
            input_ids[row, : len(rows[i])] = torch.tensor(rows[i])
            mask[row, : len(rows[i])] = 1
        yield input_ids, mask
