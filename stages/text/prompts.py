"""How a question is put to a model, and a gold solution written as its answer, down to the tokens.

    plain:  "Question: {question}\\nAnswer:\\n"      ->  <s> + text
    chat:   the model's own chat template over [system], user

Prompt and completion are tokenized apart and joined as ids. Training and generation therefore meet at
the same token, whatever the tokenizer would merge across the border.
"""

from __future__ import annotations

import re
from typing import Any

from stages.run.errors import UserError
from stages.run.params import Prompt


def prompt_text(prompt: Prompt, question: str, style: str | None = None) -> str:
    """The user's turn in one style (the default one when not given)."""
    return prompt.styles[style or prompt.default].replace("{question}", question)


def prompt_messages(
    prompt: Prompt, question: str, style: str | None = None, system: str | None = None
) -> list[dict[str, str]]:
    """The turns of a chat prompt, for the tokenizer's template; `system` replaces the profile's system."""
    messages = [{"role": "user", "content": prompt_text(prompt, question, style)}]
    if system or prompt.system:
        messages.insert(0, {"role": "system", "content": system or prompt.system or ""})
    return messages


def prompt_ids(
    tokenizer: Any, prompt: Prompt, question: str, style: str | None = None, system: str | None = None
) -> list[int]:
    """Token ids of the filled prompt, up to where the model's own words begin.

    `system` replaces the profile's system line (chat prompts only).
    """
    if prompt.chat:
        messages = prompt_messages(prompt, question, style, system)
        filled = filled_template(tokenizer, messages)
        if not filled.endswith(prompt.opening):
            raise UserError(
                f"prompt.opening: the chat template does not end in {prompt.opening!r} "
                f"but in {filled[-20:]!r}"
            )
        return list(tokenizer(filled, add_special_tokens=False)["input_ids"])
    text = prompt_text(prompt, question, style)
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]


def filled_template(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """The tokenizer's chat template over these turns, up to where the model's own words begin.

    Raises UserError when there is none, or when it refuses the turns, as many do with a system line.
    """
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        roles = " and ".join(message["role"] for message in messages)
        raise UserError(
            f"prompt: the model's chat template refuses {roles} turns ({str(error).strip():.160}); "
            "leave out what it refuses (prompt.system, and the arms' own), or set chat: false"
        ) from None
    except ValueError:
        raise UserError(
            "prompt.chat: is true, but the tokenizer has no chat template; set chat: false"
        ) from None


def completion_text(prompt: Prompt, solution: str) -> str:
    """A gold solution as the model should write it: `{solution}`, or its `{steps}` and `{answer}`."""
    steps, _, answer = solution.rpartition("####")
    values = {"{solution}": solution.strip(), "{steps}": steps.strip(), "{answer}": answer.strip()}
    return re.sub("|".join(map(re.escape, values)), lambda found: values[found[0]], prompt.completion)


def completion_ids(tokenizer: Any, text: str, ended: bool = True, opening: str = "") -> list[int]:
    """Token ids of a completion; the end token closes it unless the text was cut off.

    `opening` is left out: the prompt's tokens hold it already. The rest is read as the text of a new line,
    which is where the prompts of all profiles leave off. Read by itself, Llama's tokenizers would put a space
    before its first word, and the model would learn to write it. An end token that the text spells out is not doubled.
    """
    text = text.removeprefix(opening)
    if ended and text.rstrip().endswith(tokenizer.eos_token):
        text = text.rstrip().removesuffix(tokenizer.eos_token)
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    line = list(tokenizer("\n", add_special_tokens=False)["input_ids"])
    on_line = list(tokenizer("\n" + text, add_special_tokens=False)["input_ids"])
    if on_line[: len(line)] == line:  # else the break and the first word are one token
        ids = on_line[len(line) :]
    return [*ids, tokenizer.eos_token_id] if ended else ids
