"""The first layer: thoughts, a repeated prompt, an end token and a next problem are no part of the solution."""

from __future__ import annotations

import pytest

from stages.text.answers import read_answer

QUESTION = "Janet has 16 eggs and eats 7. She sells each for $2. How much does she make?"
SOLVED = "9*2=18\n#### 18"
EXAMPLE = "Give the final answer in the format '#### 42'."

# Each is a prompt before the solution, or a problem behind it: the answer is 18, and it is a leak.
WITH_THE_QUESTION = {
    "next question": f"{SOLVED}\n\nQuestion:\nTom has 5 pens.\nAnswer:\n#### 5",
    "next question in the line": f"{SOLVED} Question: Tom has 5 pens. #### 5",
    "prompt once more": f"{SOLVED}\nAnswer:\nLet's think step by step. 3 #### 3",
    "instruction": "So \\boxed{18}.\n\n### Instruction: count\n\\boxed{4}",
    "the question again": f"{SOLVED}\n\n{QUESTION}\n#### 9",
    "next turn of gpt-oss": f"{SOLVED}\n<|start|>user<|message|>Tom has 5 pens. #### 5",
    "whole prompt": f"Question:\n{QUESTION} Write it as #### 42.\nAnswer:\nLet's think step by step.\n{SOLVED}",
    "question, then an example": f"{QUESTION}\nEnd with #### 42.\nSolution: {SOLVED}",
    "shots": f"Question: another one\nAnswer: #### 42\n\nQuestion: {QUESTION}\nAnswer: {SOLVED}",
    "chat": f"<|im_start|>user\n{QUESTION} #### 42<|im_end|>\n<|im_start|>assistant\n{SOLVED}<|im_end|>",
    "gemma": f"<start_of_turn>user\n{QUESTION} #### 42<end_of_turn>\n<start_of_turn>model\n{SOLVED}<end_of_turn>",
    "example, then the question": f"{EXAMPLE}\n\nProblem:\n{QUESTION}\n\nSolution:\n{SOLVED}",
    "example without quotes": f"Write the answer as #### 42.\n\nProblem:\n{QUESTION}\n\nSolution:\n{SOLVED}",
    "example cut": f"#### 42'.\n\nProblem:\n{QUESTION}\n\nSolution:\n{SOLVED}",
    "question cut": f"{QUESTION[20:]}\n\nSolution:\n{SOLVED}",
    "question cut, example behind it": f"{QUESTION[33:]} End with '#### 42'.\n\nSolution:\n{SOLVED}",
}  # fmt: skip
WITHOUT = {
    "whole prompt": f"Question:\n{QUESTION} See #### 42.\nAnswer:\n{SOLVED}",
    "example first": f"{EXAMPLE}\n\nProblem:\n{QUESTION}\n\nSolution:\n{SOLVED}",
    "instruction first": f"You are a tutor. Solve it.\n\nProblem:\n{QUESTION} #### 42\n\nSolution:\n{SOLVED}",
    "cut instruction": f"r with '#### 42'.\n\n### Problem: {QUESTION}\n\n### Solution:\n{SOLVED}",
}  # fmt: skip
THOUGHTS = {
    "<think>": "<think>so 42, #### 42, \\boxed{41}</think>\nShe has 18.\n#### 18",
    "<think> not opened": "thinking 42, #### 42</think>\\boxed{18}",
    "<think> twice": "<think>a</think> #### 5 </think> The answer is 18",
    "<thinking>": "<thinking>maybe #### 42, no</thinking>\nShe has #### 18",
    "<reasoning>": "<reasoning>maybe #### 42</reasoning>\n<answer>18</answer>",
    "<Thought>": "<Thought>maybe #### 42</Thought>\n#### 18",
    "<scratchpad>": "<scratchpad>#### 42</scratchpad>\n#### 18",
    "<seed:think>": "<seed:think>#### 42</seed:think>#### 18",
    "[THINK]": "[THINK]maybe #### 42[/THINK]She has #### 18",
    "begin_of_thought": "<|begin_of_thought|>#### 42<|end_of_thought|><|begin_of_solution|>#### 18<|end_of_solution|>",
    "START_THINKING": "<|START_THINKING|>#### 42<|END_THINKING|>#### 18",
    "◁think▷": "◁think▷#### 42◁/think▷#### 18",
    "channels": "<|channel|>analysis<|message|>The answer is 42? no.<|end|><|start|>assistant<|channel|>final"
    "<|message|>The answer is 18.<|return|>",
    "channels without their tokens": "analysisThe answer is 42? no, wrong.assistantfinalThe answer is 18.",
    "and a next problem with thoughts": "<think>a</think>#### 18\nQuestion: b?\n<think>c</think>#### 42",
    "thinks again": "<think>a</think>#### 18\n<think>or #### 42",
}  # fmt: skip


@pytest.mark.parametrize("kind", WITH_THE_QUESTION)
def test_answer_is_the_solutions_own_and_the_leak_is_said(kind: str) -> None:
    reading = read_answer(WITH_THE_QUESTION[kind], QUESTION)
    assert (reading.answer, reading.leak) == ("18", True)


@pytest.mark.parametrize("kind", WITHOUT)
def test_a_prompt_is_known_by_its_form_alone(kind: str) -> None:
    reading = read_answer(WITHOUT[kind])
    assert (reading.answer, reading.leak) == ("18", True)


@pytest.mark.parametrize("kind", THOUGHTS)
def test_thoughts_are_not_looked_at(kind: str) -> None:
    assert read_answer(THOUGHTS[kind]).answer == "18"


@pytest.mark.parametrize(
    "text", ["<think>the answer is 42. #### 42", "[THINK]#### 42", "<|channel|>analysis<|message|>#### 42"]
)
def test_a_thought_that_never_ends_gives_no_answer(text: str) -> None:
    reading = read_answer(text)
    assert (reading.answer, reading.flexible_answer) == (None, "42")


@pytest.mark.parametrize(
    "text",
    [
        f"{EXAMPLE}\n\nProblem:\n{QUESTION}\n\nSolution:\nI do not know.",
        f"{EXAMPLE[20:]}\n\nProblem:\n{QUESTION}\n\nSolution:\n",
        "I will answer as '#### 42' wants it.",
        "I cannot say.\n\nQuestion:\nTom has 5 pens.\nAnswer:\n#### 5",
    ],
)
def test_what_belongs_to_a_prompt_or_another_problem_is_no_answer(text: str) -> None:
    assert read_answer(text, QUESTION).answer is None


def test_a_letter_inside_a_line_is_no_statement() -> None:
    reading = read_answer("9*2=18. A: 18\nQ: Tom has 5 pens.\nA: 5", QUESTION)
    assert (reading.answer, reading.flexible_answer, reading.leak) == (None, "18", True)


@pytest.mark.parametrize("token", ["</s>", "<|im_end|>", "<|eot_id|>", "<｜end▁of▁sentence｜>", "<|endoftext|>",
    "<end_of_turn>", "<|im_end|>\n</s>"])  # fmt: skip
def test_an_end_token_is_neither_leak_nor_tail(token: str) -> None:
    reading = read_answer(f"{SOLVED}{token}\n", QUESTION)
    assert (reading.answer, reading.leak, reading.tail) == ("18", False, False)


@pytest.mark.parametrize(
    "text", ["A: 18</s> #### 5", f"{SOLVED}<|im_end|>\n<|im_start|>user\nTom has 5 pens. #### 5"]
)
def test_text_after_an_end_token_is_cut_and_told(text: str) -> None:
    reading = read_answer(text)
    assert (reading.answer, reading.leak, reading.tail) == ("18", False, True)


@pytest.mark.parametrize(
    "start",
    [
        "The problem states that 9*2=18.",
        "Quentin, a User: no",
        "Let's think step by step.",
        "For example 9*2=18.",
    ],
)
def test_ordinary_words_are_no_leak(start: str) -> None:
    reading = read_answer(f"{start}\n#### 18", QUESTION)
    assert (reading.answer, reading.leak, reading.tail) == ("18", False, False)


def test_bounds_of_the_solution() -> None:
    text = f"Question:\n{QUESTION}\nAnswer:\n{SOLVED}\n\nQuestion:\nTom"
    reading = read_answer(text, QUESTION)
    assert text[reading.start : reading.end].strip() == f"Answer:\n{SOLVED}"
