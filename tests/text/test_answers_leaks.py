"""Answers, family 3: a repeated prompt or a problem begun after the answer never gives it."""

from __future__ import annotations

import pytest

from stages.text.answers import read_answer

QUESTION = "Janet has 16 eggs and eats 7. She sells each for $2. How much does she make?"


@pytest.mark.parametrize(
    "completion",
    [
        "9*2=18\n#### 18\n\nQuestion:\nTom has 5 pens.\nAnswer:\n#### 5",
        "9*2=18\n#### 18 Question: Tom has 5 pens. #### 5",
        "9*2=18\n#### 18\nAnswer:\nLet's think step by step. 3 #### 3",
        "So \\boxed{18}.\n\n### Instruction: count\n\\boxed{4}",
        f"9*2=18\n#### 18\n\n{QUESTION}\n#### 9",
        f"Question:\n{QUESTION} Write it as #### 42.\nAnswer:\nLet's think step by step.\n9*2=18\n#### 18",
        f"{QUESTION}\nEnd with #### 42.\nSolution: 9*2=18\n#### 18",
        f"Question: another one\nAnswer: #### 42\n\nQuestion: {QUESTION}\nAnswer: 9*2=18\n#### 18",
        f"<|im_start|>user\n{QUESTION} #### 42<|im_end|>\n<|im_start|>assistant\n9*2=18\n#### 18<|im_end|>",
    ],
)
def test_answer_is_the_solutions_own_and_the_leak_is_said(completion: str) -> None:
    reading = read_answer(completion, QUESTION)
    assert (reading.answer, reading.leak) == ("18", True)


def test_prompt_form_without_the_question_known() -> None:
    reading = read_answer("Question:\nJanet has eggs, see #### 42.\nAnswer:\n9*2=18\n#### 18")
    assert (reading.answer, reading.leak) == ("18", True)


def test_next_problem_without_an_answer_before_it_gives_none() -> None:
    """The second problem's answer is not taken for the first one's."""
    reading = read_answer("I cannot say.\n\nQuestion:\nTom has 5 pens.\nAnswer:\n#### 5", QUESTION)
    assert (reading.answer, reading.flexible_answer, reading.leak) == (None, None, True)
    # `A:` inside a line is no statement either.
    reading = read_answer("9*2=18. A: 18\nQ: Tom has 5 pens.\nA: 5", QUESTION)
    assert (reading.answer, reading.flexible_answer, reading.leak) == (None, "18", True)


def test_text_after_an_end_token_is_cut() -> None:
    reading = read_answer("A: 18</s> #### 5")
    assert (reading.answer, reading.leak) == ("18", False)


@pytest.mark.parametrize(
    "start", ["The problem states that 9*2=18.", "Quentin, a User: no", "Let's think step by step."]
)
def test_ordinary_words_are_no_leak(start: str) -> None:
    reading = read_answer(f"{start}\n#### 18", QUESTION)
    assert (reading.answer, reading.leak) == ("18", False)


def test_bounds_of_the_solution() -> None:
    text = f"Question:\n{QUESTION}\nAnswer:\n9*2=18\n#### 18\n\nQuestion:\nTom"
    reading = read_answer(text, QUESTION)
    assert text[reading.start : reading.end].strip() == "Answer:\n9*2=18\n#### 18"
