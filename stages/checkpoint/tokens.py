"""Finds the tokens that end an answer, and a pad token that is none of them, by rule and not by the model's name.

Padding is masked everywhere, so any token that no text holds will do. It must only differ from the end token: training
could not tell an answer's end from what fills up its row.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from stages.run.errors import UserError
from stages.run.files import read_json

# The words that a token without a use has in its text, best first: <|finetune_right_pad_id|>, <|padding|>; then
# <|reserved_special_token_0|>, [UNUSED_TOKEN_3], <extra_id_0>, <|placeholder1|>, <|dummy_85|>.
SPARE_WORDS = ({"pad", "padding"}, {"reserved", "unused", "spare", "extra", "placeholder", "dummy"})
NEW_NAMES = ("<pad>", "<|pad|>", "<|padding|>", "<|new_pad|>")


def declared_ids(folder: Path) -> dict[str, list[int]]:
    """Ids of the begin and the end tokens (`bos`, `eos`) that the model's files name themselves.

    transformers would fill in what a config does not name from its class, and there the end token of Llama is 2,
    whatever the tokenizer has at that place. Raises UserError for what is no id.
    """
    found: dict[str, list[int]] = {}
    for name in ("generation_config.json", "config.json"):
        content = read_json(folder / name) if (folder / name).is_file() else {}
        for kind in ("bos", "eos"):
            value = content.get(key := f"{kind}_token_id") if isinstance(content, dict) else None
            if value is None or kind in found:
                continue
            found[kind] = value if isinstance(value, list) else [value]
            if not all(type(one) is int for one in found[kind]):
                raise UserError(f"{folder / name}: {key} is {value!r:.80}, which is no token id; correct it")
    return found


def end_tokens(tokenizer: Any, folder: Path, declared: list[int]) -> tuple[list[int], str]:
    """The ids of all tokens that end an answer, and a line about declared ones that do not, or "".

    They are the tokenizer's own, which is trained, and those declared, except ordinary text: a model made by hand may
    declare what its class does by default. Raises UserError when the tokenizer names none.
    """
    special = tokenizer.added_tokens_decoder
    if tokenizer.eos_token_id is None:
        names = [special[one].content for one in declared if one in special]
        hint = f', such as "eos_token": "{names[0]}", which the model\'s config declares' if names else ""
        raise UserError(
            f"{folder}: the tokenizer names no end token, so the model could not learn where an answer ends; name it "
            f"in tokenizer_config.json{hint}"
        )
    text = sorted(set(declared) - {tokenizer.eos_token_id, *special})
    line = f"eos_token_id: {', '.join(map(str, text))} is no special token of the tokenizer's, so it ends nothing"
    return sorted({tokenizer.eos_token_id, *declared} - set(text)), line if text else ""


def choose_pad(tokenizer: Any, rows: int, ends: Collection[int]) -> str:
    """Give the tokenizer a pad token that is not its end token; returns a line that says which one.

    The tokenizer's own; else a spare token with an embedding (there are `rows`), which ends nothing, has no other role,
    and is in no chat template; else the token for unknown text; else a new token. A new one, and one of its own, may
    lie beyond the embeddings, which must then grow.
    """
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        return f"pad token: {tokenizer.pad_token}, the tokenizer's own"
    why = "its own is the end token" if tokenizer.pad_token_id is not None else "it has none of its own"
    roles = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, *ends]
    template = str(tokenizer.chat_template or "")  # one text, or several by name
    ranked = []
    for number, token in tokenizer.added_tokens_decoder.items():
        words = set(re.findall("[a-z]+", token.content.lower()))
        rank = next((place for place, spare in enumerate(SPARE_WORDS) if words & spare), None)
        if rank is not None and number < rows and number not in roles and token.content not in template:
            ranked.append((rank, not token.special, number, token.content))
    if ranked:
        *_, name = min(ranked)
        tokenizer.add_special_tokens({"pad_token": name})
        return f"pad token: {name}, a spare one of the tokenizer's ({why})"
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown < rows and unknown not in (tokenizer.bos_token_id, *ends):
        tokenizer.add_special_tokens({"pad_token": tokenizer.unk_token})
        return f"pad token: {tokenizer.unk_token}, the one for unknown text ({why}, and none is spare)"
    vocabulary = tokenizer.get_vocab()
    name = next(one for one in NEW_NAMES if one not in vocabulary)
    tokenizer.add_special_tokens({"pad_token": AddedToken(name, normalized=False, special=True)})
    row = "a free row" if tokenizer.pad_token_id < rows else "a new row"
    return f"pad token: {name}, new, in {row} of the embeddings, {tokenizer.pad_token_id:,} ({why}, and none is spare)"


def rows_needed(tokenizer: Any, rows: int, folder: Path) -> int:
    """The rows that the embeddings must have: `rows` as they are, or enough for a pad token beyond them.

    Raises UserError when another token has no embedding.
    """
    beyond = [number for number in tokenizer.get_vocab().values() if number >= rows]
    if set(beyond) - {tokenizer.pad_token_id}:
        raise UserError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, more than the {rows} the model has embeddings for"
        )
    return max([rows, *(number + 1 for number in beyond)])
