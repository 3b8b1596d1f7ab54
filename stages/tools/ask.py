"""`python -m stages ask "QUESTION"`: puts a question to a policy of your own and shows its answer as it comes.

    $ python -m stages ask "Ann has 3 bags of 4 apples and eats 2. How many apples are left?" --policy sft
    Ann has <<3*4=12>>12 apples.
    ...
    answer: 10

One plain model call: the prompt is the evaluation's, and greedy decoding gives the evaluation's completion.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any, TextIO

from stages.run.errors import UserError
from stages.run.params import Params, load_params
from stages.run.paths import ADAPTERS, BASE
from stages.text.answers import Reading, read_answer


def main(
    question: str | None,
    policy: str = "dpo",
    temperature: float = 0.0,
    seed: int = 0,
    max_new_tokens: int | None = None,
    out: TextIO | None = None,
) -> None:
    """Answer one question (`-`: the standard input), or without one, those typed in a terminal.

    `temperature` 0 is greedy decoding; above 0, `top_p` is the evaluation's. `max_new_tokens` is the
    evaluation's unless given. Raises UserError when the policy has no checkpoint, or nothing is asked.
    """
    params = load_params()
    out = out or sys.stdout
    check_policy("ask", policy)
    if not 0 <= temperature <= 5:
        raise UserError(f"--temperature {temperature}: must be from 0 (greedy) to 5")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {max_new_tokens}: must be 1 or more")
    if question is None and not sys.stdin.isatty():
        raise UserError("ask: no question; write it behind the command in quotes, or - to read it from stdin")
    given = sys.stdin.read() if question == "-" else question
    limit = max_new_tokens or params.evaluate.max_new_tokens
    answer: Callable[[str], tuple[Reading, bool]] | None = None
    for asked in _typed() if given is None else [given]:
        if not asked.strip():
            raise UserError("ask: the question is empty")
        answer = answer or _answerer(params, policy, temperature, seed, limit, out)
        reading, ended = answer(asked.strip())
        out.write("\n" + "\n".join(_words(reading, ended, limit)) + "\n")
        out.flush()


def check_policy(tool: str, policy: str) -> None:
    """Raises UserError when there is no such policy, or its checkpoints are not here; `tool` is who says so."""
    if policy not in ADAPTERS:
        raise UserError(f"{tool}: no policy '{policy}'; choose one of {', '.join(ADAPTERS)}")
    adapter = ADAPTERS[policy]
    for folder, file in ((BASE, "config.json"), (adapter, "adapter_config.json")):
        if folder is not None and not (folder / file).is_file():
            raise UserError(f"{folder}: is missing; run `dvc repro` to train it, or `dvc pull` to fetch it")


def _typed() -> Iterator[str]:
    """Questions typed in the terminal, until an empty line or Ctrl-D."""
    while True:
        try:
            line = input("question> ")
        except EOFError:
            print()
            return
        if not line.strip():
            return
        yield line


def _answerer(
    params: Params, policy: str, temperature: float, seed: int, limit: int, out: TextIO
) -> Callable[[str], tuple[Reading, bool]]:
    """Load the policy; returns a function that answers a question and says whether the model ended by itself."""
    import torch
    from transformers import GenerationConfig

    from stages.policy.adapter import load_policy
    from stages.policy.request import end_ids
    from stages.run.process import fix_arithmetic
    from stages.text.prompts import prompt_ids

    fix_arithmetic(params.hardware.threads, seed)
    model, tokenizer = load_policy(ADAPTERS[policy])
    ends = end_ids(tokenizer, model.generation_config)
    # The model's own config may also declare penalties or top_k, which the evaluation does not use.
    sampling = {"do_sample": True, "temperature": temperature, "top_p": params.evaluate.top_p, "top_k": 0}
    model.generation_config = GenerationConfig(
        max_new_tokens=limit,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        **(sampling if temperature > 0 else {"do_sample": False}),
    )

    def answer(question: str) -> tuple[Reading, bool]:
        torch.manual_seed(seed)  # the same question gives the same answer, whatever was asked before
        prompt = torch.tensor([prompt_ids(tokenizer, params.prompt, question)], device=model.device)
        stream = Stream(tokenizer, params.prompt.opening, ends, out)
        with torch.inference_mode():
            ids = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), streamer=stream)[0]
        return read_answer(stream.text, question), int(ids[-1]) in ends

    return answer


class Stream:
    """A streamer of `generate`: writes the solution token by token; `text` is what was written.

    It leaves out the end token, one of `ends`. It decodes all tokens together each time, so that the text is
    exactly what decoding at the end gives.
    """

    def __init__(self, tokenizer: Any, opening: str, ends: Collection[int], out: TextIO) -> None:
        self.tokenizer = tokenizer
        self.opening = opening
        self.ends = ends
        self.out = out
        self.text = ""
        self.tokens: list[int] = []
        self.prompt_seen = False

    def put(self, ids: Any) -> None:
        """New token ids; the first call brings the prompt."""
        if self.prompt_seen:
            self.tokens += [token for token in ids.reshape(-1).tolist() if token not in self.ends]
        self.prompt_seen = True
        self._write(self._decoded().rstrip("\ufffd"))  # the first bytes of a character wait for the others

    def end(self) -> None:
        """All tokens came."""
        self._write(self._decoded())

    def _decoded(self) -> str:
        return self.opening + str(self.tokenizer.decode(self.tokens, skip_special_tokens=True))

    def _write(self, text: str) -> None:
        if len(text) > len(self.text):
            self.out.write(text[len(self.text) :])
            self.out.flush()
            self.text = text


def _words(reading: Reading, ended: bool, limit: int) -> Iterator[str]:
    if reading.answer is not None:
        yield f"answer: {reading.answer}"
    elif reading.flexible_answer is not None:
        yield f"answer: none marked; the last number is {reading.flexible_answer}"
    else:
        yield "answer: none"
    if not ended:
        yield f"(cut at {limit} tokens; --max-new-tokens allows more)"
    if reading.leak:
        yield "(it holds a piece of the prompt or of another problem)"
