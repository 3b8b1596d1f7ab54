"""Where the solution lies: behind thoughts and a repeated prompt, before an end token and a next problem.

<think>12, no 18</think>9*2=18\\n#### 18<|im_end|>          the solution is "9*2=18\\n#### 18"
Question: ...\\nAnswer:\\n9*2=18\\n#### 18\\n\\nQuestion: ...   the same; both prompts are a leak
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from stages.text.number import as_ascii

# Thoughts: `<think>`, `[THINK]`, `<|begin_of_thought|>`, `<|START_THINKING|>`, and the channels of gpt-oss.
_NAMES = (
    r"(?:think|thinking|thoughts?|reasoning|reflection|scratchpad|analysis|inner_monologue|inner_thoughts)"
)
_OPENED = re.compile(
    rf"<(?:\w+:)?{_NAMES}>|\[think\]|<\|(?:begin|start)_?(?:of_?)?(?:thought|thinking|think)\|>|◁think▷"
    r"|<\|channel\|>(?:analysis|commentary)",
    re.IGNORECASE,
)
_CLOSED = re.compile(
    rf"</(?:\w+:)?{_NAMES}>|\[/think\]|<\|end_?(?:of_?)?(?:thought|thinking|think)\|>|◁/think▷"
    r"|<\|channel\|>final(?:<\|message\|>)?",
    re.IGNORECASE,
)
_BARE_CHANNEL = "assistantfinal"  # gpt-oss, its special tokens removed: analysis...assistantfinal...

# Where another problem begins: the pipeline's own prompt form, and the common ones.
_PROBLEM = re.compile(
    r"(?:^|\n)[ \t]*+(?:\*\*)?(?:#{1,3}[ ]?)?(?:Question|Problem|Exercise|Instruction|Human|User|Q)"
    r"(?:[ ]?[0-9]{1,4})?(?:\*\*)?:"
    r"|###[ ]?(?:Instruction|Question|Problem)\b|<\|im_start\|>(?!assistant)|<\|start\|>user"
    r"|<\|start_header_id\|>(?!assistant)|<start_of_turn>user|<\|user\|>|<\|User\|>|<｜User｜>|\[INST\]"
)
_SOLUTION = re.compile(
    r"(?:^|\n)[ \t]*+(?:\*\*)?(?:#{1,3}[ ]?)?(?:Answer|Solution|Response|Assistant|A)(?:\*\*)?:"
    r"|<\|im_start\|>assistant|<\|start_header_id\|>assistant|<start_of_turn>model|<\|assistant\|>"
    r"|<\|Assistant\|>|<｜Assistant｜>|\[/INST\]"
)
_PROMPT_AFTER_ANSWER = re.compile(
    r"\b(?:Question|Problem|Instruction)(?:[ ]?[0-9]{1,4})?:|Let's think step by step"
)
# What a prompt says and a solution does not.
_INSTRUCTION = re.compile(
    r"\b(?:format|final answer|(?:end|finish|answer) with|write (?:it|the|your)|step[- ]by[- ]step|solve|you are"
    r"|example)\b",
    re.IGNORECASE,
)
_EXAMPLE = re.compile(r"['\"]####[^\n'\"]{0,40}['\"]|####[^\n'\"]{0,40}['\"](?=[\s.,)]|\Z)")
_END_TOKEN = re.compile(
    r"</s>|<eos>|<end_of_turn>|\[/?EOS\]"
    r"|<\|(?:endoftext|end_of_text|im_end|eot_id|eom_id|eot|end|return|end_of_solution|END_OF_TURN_TOKEN)\|>"
    r"|<｜end▁of▁sentence｜>"
)
_SIGNS = (
    "Q", "Problem", "Instruction", "Exercise", "Human", "User", "<|", "<｜", "</", "[/", "[INST]", "[THINK]", "◁",
    "<eos>", "<end", "<start", "<think", "<thought", "<reason", "<reflect", "<scratch", "<analysis", "<inner",
    "Let's think", "assistantfinal", "'####", '"####',
)  # fmt: skip
CUT = 24  # characters of a question's end by which a repeated prompt is known whose beginning is missing


class Span(NamedTuple):
    """Where a solution lies in a text.

    `leak`: pieces of a prompt stand before or behind it. `tail`: more than end tokens stands behind it.
    `closed`: false when the text is a thought that never ends.
    """

    start: int
    end: int
    leak: bool
    tail: bool
    closed: bool


def is_plain(text: str, question: str | None) -> bool:
    """Whether nothing in the text hints at a thought, a prompt, a second problem or an end token. Cheap."""
    for sign in _SIGNS:
        if sign in text:
            return False
    return not question or question[-CUT:] not in text


def solution_span(text: str, question: str | None, states: Callable[[str, int, int], bool]) -> Span:
    """The span of the solution in `text`. `states(text, start, end)` says whether an answer is stated there.

    Without the question's own text, a prompt is known by its form only.
    """
    start, end, closed = _behind_thoughts(text)
    if not closed:
        return Span(0, len(text), False, False, False)
    asked = as_ascii(question).strip() if question else ""
    start, leak = _behind_prompt(text, asked, start, end, states)
    stop = end

    token = _END_TOKEN.search(text, start, end)
    end = token.start() if token else end
    following = _PROBLEM.search(text, start, end)
    if following:
        end, leak = following.start(), True
    again = text.find(asked, start, end) if asked else -1
    if again >= 0:
        end, leak = again, True
    mark = text.find("####", start, end)
    prompt = _PROMPT_AFTER_ANSWER.search(text, mark, end) if mark >= 0 else None
    if prompt:
        end, leak = prompt.start(), True
    tail = stop < len(text) or (end < stop and bool(_END_TOKEN.sub("", text[end:]).strip()))
    return Span(start, end, leak, tail, True)


def _behind_thoughts(text: str) -> tuple[int, int, bool]:
    """Start and end of what was said after thinking, and whether the thinking came to an end."""
    first = _CLOSED.search(text)
    bare = text.rfind(_BARE_CHANNEL) if text.startswith("analysis") else -1
    if bare >= 0 and first is None:
        return bare + len(_BARE_CHANNEL), len(text), True
    start = 0
    if first:
        following = _PROBLEM.search(text, first.end())
        limit = following.start() if following else len(text)
        for closing in _CLOSED.finditer(text, first.start(), limit):
            start = closing.end()
    opened = _OPENED.search(text, start)
    if opened is None:
        return start, len(text), True
    if first is None and not text[: opened.start()].strip():
        return 0, len(text), False
    return start, opened.start(), True


def _behind_prompt(
    text: str, asked: str, start: int, end: int, states: Callable[[str, int, int], bool]
) -> tuple[int, bool]:
    """Where the solution starts behind a prompt that is repeated whole or in part, and whether one is."""
    problem = _PROBLEM.search(text, start, end)
    echoed = problem is not None and not text[start : problem.start()].strip()
    place = text.find(asked, start, end) if asked else -1
    if place >= 0 and (echoed or _is_prompt(text, start, place, states)):
        after = place + len(asked)
    elif cut := _end_of_cut_question(text, asked, start, end):
        after = cut
    elif problem is not None and (echoed or _is_instruction(text, start, problem.start())):
        turn = _SOLUTION.search(text, problem.end(), end)
        if not echoed and turn is None:
            return start, False
        # Without the question's own text, its first line is taken for the question.
        line = re.compile(r"\s*+[^\n]*+").match(text, problem.end())
        after = line.end() if line else problem.end()
        turn = _SOLUTION.search(text, problem.end(), after) if echoed else turn
        after = turn.start() if turn else after
    else:
        return start, False
    turn, problem = _SOLUTION.search(text, after, end), _PROBLEM.search(text, after, end)
    if turn and not (problem and problem.start() < turn.start()):
        after = turn.start()
    return after, True


def _is_prompt(text: str, start: int, end: int, states: Callable[[str, int, int], bool]) -> bool:
    """Whether what stands before the question is a prompt, and not an answer after which the question comes again."""
    return not states(text, start, end) or _is_instruction(text, start, end)


def _is_instruction(text: str, start: int, end: int) -> bool:
    before = text[start:end]
    return "=" not in before and bool(_INSTRUCTION.search(before) or _EXAMPLE.search(before))


def _end_of_cut_question(text: str, asked: str, start: int, end: int) -> int | None:
    """Where the question ends whose last part the text begins with."""
    if len(asked) < CUT:
        return None
    place = text.find(asked[-CUT:], start, min(end, start + len(asked) + CUT))
    if place < 0 or not asked.endswith(text[start : place + CUT].strip()):
        return None
    return place + CUT
