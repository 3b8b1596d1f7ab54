"""Finds the questions that do not fit into the model's context, before anything is trained or generated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from stages.run.errors import UserError
from stages.run.params import Prompt
from stages.run.paths import BASE
from stages.text.prompts import prompt_ids

Asked = tuple[str | None, str | None]  # a style, and the system line of an arm; None: the profile's


@dataclass(frozen=True)
class Model:
    """What is asked, and how: the tokenizer, the context in tokens (None: nobody knows), and the prompt."""

    tokenizer: Any
    context: int | None
    prompt: Prompt


def refuse_long(
    path: Path,
    problems: Iterable[Mapping[str, Any]],
    asked: Iterable[Asked],
    model: Model,
    key: str = "",
    new: int = 1,
) -> None:
    """Raise UserError when questions of `path`, put in any of the ways `asked`, leave no room for `new` tokens.

    `key` is the parameter that says how many new tokens there may be.
    """
    if model.context is None:
        return
    ways = list(asked)

    def longest_prompt(question: str) -> int:
        return max(len(prompt_ids(model.tokenizer, model.prompt, question, *way)) for way in ways)

    # A token stands for at least one byte of text, so most questions need not be tokenized.
    around = longest_prompt("")
    lengths = {}
    for problem in problems:
        if around + len(problem["question"].encode()) + new > model.context:
            length = longest_prompt(problem["question"])
            if length + new > model.context:
                lengths[problem["id"]] = length
    if lengths:
        longest = max(lengths, key=lengths.__getitem__)
        count = f"{len(lengths):,} question{'s' * (len(lengths) > 1)}"
        room = f" (with {key}, {new:,}, for the answer)" if key else ""
        raise UserError(
            f"{path}: {count} too long for the model's context of {model.context:,} tokens{room}; {longest} is the "
            f"longest, {lengths[longest]:,}; leave them out{f', lower {key}' if key else ''}, or take a model with a "
            "longer context"
        )


def context_size(config: Any) -> int | None:
    """The tokens that a model's positions reach, prompt and completion together; None where its config does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def base_context() -> int | None:
    """`context_size` of the base model."""
    return context_size(AutoConfig.from_pretrained(BASE, local_files_only=True))
