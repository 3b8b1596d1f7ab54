"""`python -m stages ask "QUESTION"`: puts a question to a policy of your own and shows its answer as it comes.

One plain model call: the prompt is the evaluation's, and greedy decoding gives the evaluation's completion.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from typing import Any

from stages.run.errors import UserError
from stages.run.params import load_params
from stages.run.paths import BASE, LAST_ROUND
from stages.run.rounds import adapter_of
from stages.text.answers import Reading, read_answer


def main(
    question: str,
    policy: str = LAST_ROUND,
    temperature: float = 0.0,
    seed: int = 0,
    max_new_tokens: int | None = None,
    samples: int = 1,
) -> None:
    """Answer one question, `-` being the standard input. `temperature` 0 is greedy; above 0, `top_p` is evaluation's.

    `max_new_tokens` is the evaluation's unless given. Raises UserError when the policy has no checkpoint, or the
    question is empty or not in UTF-8.
    """
    params = load_params()
    check_checkpoints(policy)
    try:
        # Other bytes on the command line come as half characters, which cannot be encoded.
        words = sys.stdin.buffer.read() if question == "-" else question.encode()
        question = words.decode("utf-8-sig").strip()
    except UnicodeError as error:
        raise UserError(f"ask: the question is not text in UTF-8 ({error})") from None
    if not question:
        raise UserError("ask: the question is empty")
    if samples > 1:  # they vote for the answer
        from stages.tools.ask_samples import ask_samples  # needs Regime W, which one answer does not

        ask_samples(question, policy, samples, temperature, seed, max_new_tokens)
        return

    import torch
    from transformers import GenerationConfig

    from stages.policy.adapter import load_policy
    from stages.policy.context import context_size
    from stages.policy.request import end_ids
    from stages.run.process import fix_arithmetic
    from stages.text.prompts import prompt_ids

    fix_arithmetic(params.hardware.threads, seed)
    model, tokenizer = load_policy(adapter_of(policy))
    ends = end_ids(tokenizer, model.generation_config)
    limit = max_new_tokens or params.evaluate.max_new_tokens
    # The model's own config may also declare penalties or top_k, which the evaluation does not use.
    sampling = {"do_sample": True, "temperature": temperature, "top_p": params.evaluate.top_p, "top_k": 0}
    model.generation_config = GenerationConfig(
        max_new_tokens=limit,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        **(sampling if temperature > 0 else {"do_sample": False}),
    )
    prompt = torch.tensor([prompt_ids(tokenizer, params.prompt, question)], device=model.device)
    if (context := context_size(model.config)) and prompt.shape[1] + limit > context:
        raise UserError(
            f"ask: the question has {prompt.shape[1]:,} tokens with its prompt, which with {limit:,} new ones is more "
            f"than the model's context of {context:,}; ask a shorter one, or lower --max-new-tokens"
        )
    stream = Stream(tokenizer, params.prompt.opening, ends)
    with torch.inference_mode():
        ids = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), streamer=stream)[0]
    print("", *_words(read_answer(stream.text, question)), sep="\n")
    if int(ids[-1]) not in ends:
        print(f"(cut at {limit} tokens; --max-new-tokens allows more)")


def check_checkpoints(policy: str) -> None:
    """Raises UserError when the policy's checkpoints are not here."""
    for folder, file in ((BASE, "config.json"), (adapter_of(policy), "adapter_config.json")):
        if folder is not None and not (folder / file).is_file():
            raise UserError(f"{folder}: is missing; run `dvc repro` to train it, or `dvc pull` to fetch it")


class Stream:
    """A streamer of `generate`: writes the solution token by token; `text` is what was written.

    It leaves out the end token, one of `ends`. It decodes all tokens together each time, so that the text is
    exactly what decoding at the end gives.
    """

    def __init__(self, tokenizer: Any, opening: str, ends: Collection[int]) -> None:
        self.tokenizer = tokenizer
        self.opening = opening
        self.ends = ends
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
            print(text[len(self.text) :], end="", flush=True)
            self.text = text


def _words(reading: Reading) -> Iterator[str]:
    if reading.answer is not None:
        yield f"answer: {reading.answer}"
    elif reading.flexible_answer is not None:
        yield f"answer: none marked; the last number is {reading.flexible_answer}"
    else:
        yield "answer: none"
    if reading.leak:
        yield "(it holds a piece of the prompt or of another problem)"
