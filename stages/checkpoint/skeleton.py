"""Reads a published model's config and tokenizer, and builds the model on torch's `meta` device, without weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from sentencepiece import SentencePieceProcessor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, dynamic_module_utils

from stages.run.errors import UserError
from stages.run.files import read_json
from stages.run.params import DirectoryModel, HubModel

PAD_CANDIDATES = ("<pad>", "[PAD]", "<|pad|>", "<｜▁pad▁｜>", "<|finetune_right_pad_id|>", "<unk>")
# Texts on which two tokenizers must agree. None begins with a space: there they may differ, and no prompt does.
TOKENIZED = (
    "Question:\nAnn has 3 bags of 4 apples and eats 2.  How many are left?\nAnswer:\nLet's think step by step.\n",
    "3*4=<<3*4=12>>12 apples, 1,000.5 dollars – café, 中\n\n#### 10",
)


def skeleton(spec: HubModel | DirectoryModel, folder: Path) -> tuple[Any, Any]:
    """The model without its weights, with its configs as they are to be saved, and its tokenizer."""
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = (
        0  # otherwise transformers asks whether to run a model's own code
    )
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
    # The profile says how to decode, so the model's own sampling settings are dropped.
    model.generation_config.update(do_sample=False, temperature=None, top_p=None, top_k=None)
    return model, tokenizer


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model's folder.

    When there is only a sentencepiece model, transformers 5 converts it by the kind of the language model, and for
    Mistral it then leaves out the space before the first word. So the class that the tokenizer's own config names
    converts it here, and the result must divide texts as the sentencepiece model does.
    """
    sentences = folder / "tokenizer.model"
    if (folder / "tokenizer.json").is_file() or not sentences.is_file():
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
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
    """Turn an error that transformers raises about one of the small files into one line."""
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


def ensure_pad(tokenizer: Any) -> None:
    """Give the tokenizer a pad token from its vocabulary that is not the end token."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    vocabulary = tokenizer.get_vocab()
    for name in PAD_CANDIDATES:
        if name in vocabulary and name != tokenizer.eos_token:
            tokenizer.pad_token = name
            return
    raise UserError("the tokenizer has no token that could serve for padding; add one to it and its model")
