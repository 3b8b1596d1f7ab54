"""Training and generation put a question to the model in the same tokens."""

from __future__ import annotations

from typing import Any

import pytest

from stages.run.params import Prompt
from stages.text.prompts import completion_ids, completion_text, prompt_ids, prompt_messages, prompt_text

SOLUTION = "She has <<3*4=12>>12 apples.\n12 - 2 = 10\n#### 10"
PLAIN = Prompt(
    chat=False,
    default="plain",
    styles={"plain": "Question: {question}\nAnswer:\n", "short": "{question} "},
    completion="{solution}",
)
CHAT = Prompt(
    chat=True,
    system="Be exact.",
    default="plain",
    styles={"plain": "{question}\nThink."},
    completion="<think>\n{steps}\n</think>\n\nThe answer is {answer}.",
)


class Characters:
    """A tokenizer with one token a character: 1 is <s>, 2 is </s>."""

    eos_token, eos_token_id = "</s>", 2

    def __init__(self, bos: int | None = 1) -> None:
        self.bos_token_id = bos

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, Any]:
        ids = [ord(char) for char in text]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}

    def apply_chat_template(
        self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert not tokenize and add_generation_prompt
        return "|" + "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


def text_of(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def test_plain_prompt_begins_with_the_start_token_once() -> None:
    """<s>, the filled template, and no end token. A tokenizer without a start token puts nothing in front."""
    ids = prompt_ids(Characters(), PLAIN, "Why?")
    assert ids[0] == 1 and text_of(ids[1:]) == "Question: Why?\nAnswer:\n"
    assert text_of(prompt_ids(Characters(bos=None), PLAIN, "Why?", "short")) == "Why? "


@pytest.mark.parametrize("question", ["{question}", "{solution} {x}", "100 % {}", "\\1 \\g<0>", "%s"])
def test_question_is_put_in_as_it_stands(question: str) -> None:
    """Braces and backslashes in a question are text."""
    assert prompt_text(PLAIN, question) == f"Question: {question}\nAnswer:\n"


def test_chat_prompt_goes_through_the_tokenizers_template() -> None:
    """The template brings its own special tokens; none is added."""
    ids = prompt_ids(Characters(), CHAT, "Why?")
    assert text_of(ids) == "|<system>Be exact.<user>Why?\nThink.<assistant>"
    assert 1 not in ids and 2 not in ids


def test_an_arms_system_line_replaces_the_profiles() -> None:
    """One system turn, never two; none when neither is given."""
    assert prompt_messages(CHAT, "Why?", system="Be brief.") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?\nThink."},
    ]
    silent = CHAT.model_copy(update={"system": None})
    assert [message["role"] for message in prompt_messages(silent, "Why?")] == ["user"]


@pytest.mark.parametrize(
    ("prompt", "solution", "expected"),
    [
        (PLAIN, SOLUTION + "\n", SOLUTION),
        (CHAT, SOLUTION, "<think>\nShe has <<3*4=12>>12 apples.\n12 - 2 = 10\n</think>\n\nThe answer is 10."),
        (PLAIN, "{steps} {answer} {solution}\n#### 1", "{steps} {answer} {solution}\n#### 1"),
    ],
)
def test_completion_is_the_solution_or_its_parts(prompt: Prompt, solution: str, expected: str) -> None:
    """`{steps}` is what comes before the last ####, `{answer}` what follows. Placeholders in the data are text."""
    assert completion_text(prompt, solution) == expected


def test_completion_ends_with_the_end_token() -> None:
    """The end is learned, except where a text was cut off."""
    tokenizer = Characters()
    assert completion_ids(tokenizer, "ab") == [97, 98, 2]
    assert completion_ids(tokenizer, "ab", ended=False) == [97, 98]
    assert completion_ids(tokenizer, f"ab{tokenizer.eos_token}\n") == [97, 98, 2]
