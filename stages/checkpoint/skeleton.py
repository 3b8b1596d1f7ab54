"""Reads a published model's config and tokenizer, and builds the model on torch's `meta` device, without weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from sentencepiece import SentencePieceProcessor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, dynamic_module_utils

from stages.checkpoint.tokens import choose_pad, declared_ids, end_tokens, rows_needed
from stages.run.errors import UserError
from stages.run.files import read_json
from stages.run.params import DirectoryModel, HubModel

# Texts on which two tokenizers must agree. None begins with a space: there they may differ, and no prompt does.
TOKENIZED = (
    "Question:\nAnn has 3 bags of 4 apples and eats 2.  How many are left?\nAnswer:\nLet's think step by step.\n",
    "3*4=<<3*4=12>>12 apples, 1,000.5 dollars – café, 中\n\n#### 10",
)


@dataclass(frozen=True)
class Skeleton:
    """A model without its weights, with its configs as they are to be saved."""

    model: Any
    tokenizer: Any
    rows: int  # that the embeddings are to have
    quantized: str  # how its config says that the weights are quantized; "" if it does not
    lines: list[str]  # which pad token was taken, and what was left out


def skeleton(spec: HubModel | DirectoryModel, folder: Path) -> Skeleton:
    """Read the config and the tokenizer in `folder`. Raises UserError when the model cannot be trained or asked."""
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = (
        0  # otherwise transformers asks whether to run a model's own code
    )
    with readable(folder, "config.json"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    quantized = quantization(config)
    for name, value in spec.overrides.items():
        if not hasattr(config, name):
            raise UserError(f"model.overrides.{name}: the model's config has no such setting")
        setattr(config, name, value)
    with readable(folder, "the tokenizer"):
        tokenizer = read_tokenizer(folder)
    with readable(folder, "config.json"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, spec.dtype))
    rows = model.get_input_embeddings().weight.shape[0]

    # The tokens with a role. The profile says how to decode, so all else that the model says of generation is dropped.
    declared = declared_ids(folder)
    ends, left_out = end_tokens(tokenizer, folder, declared.get("eos", []))
    pad = choose_pad(tokenizer, rows, ends)
    ids = {
        "bos_token_id": next((one for one in declared.get("bos", []) if one < rows), tokenizer.bos_token_id),
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": tokenizer.pad_token_id,
    }
    model.generation_config = GenerationConfig(**ids)
    # Older configs hold some of it too, and transformers 5 saves none of them.
    for name in model.config._get_generation_parameters():
        delattr(model.config, name)
    model.config.update({"dtype": spec.dtype, "architectures": [type(model).__name__], **ids})
    return Skeleton(
        model, tokenizer, rows_needed(tokenizer, rows, folder), quantized, [*filter(None, [left_out]), pad]
    )


def quantization(config: Any) -> str:
    """How the config says that the weights are quantized, or ""; the config says so no longer."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return ""
    del config.quantization_config
    settings = found if isinstance(found, dict) else found.to_dict()
    return str(settings.get("quant_method") or "by an unknown method")


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
