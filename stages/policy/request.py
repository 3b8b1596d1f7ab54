"""What an engine is asked for and what it gives back: requests in, completions out as they finish."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class Request:
    """One completion wanted. `temperature` 0 is greedy decoding; `top_p` and `seed` matter only above 0."""

    id: str
    prompt: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """What the policy wrote for a request.

    `tokens` are the new token ids without the end token. `finish` is `stop` (the end token came) or
    `length`. `logprob` is the summed natural-log probability of all new tokens, the end token included,
    at temperature 1.
    """

    id: str
    tokens: tuple[int, ...]
    finish: Literal["stop", "length"]
    logprob: float


class EngineStartError(RuntimeError):
    """An engine could not start. A stage with one engine ends; a stage with several workers loses one worker."""


class Engine(Protocol):
    """Completes requests with one policy."""

    def generate(
        self, requests: Iterable[Request], done: frozenset[str] = frozenset()
    ) -> Iterator[Completion]:
        """Complete every request whose id is not in `done`, in the order in which they finish.

        A resumed run passes all its requests again, so that the engine can form the same batches as before.
        """
        ...


def request_seed(seed: int, *parts: str) -> int:
    """A request's own 63-bit seed, from the run's seed and the `parts` that name the request."""
    text = "/".join((str(seed), *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def rollout_seed(seed: int, later_round: str, question_id: str, pull: str) -> int:
    """The seed of one trajectory. `later_round` is empty for the first round, whatever it is called."""
    return request_seed(seed, "rollout", *filter(None, (later_round,)), question_id, pull)


def end_ids(tokenizer: Any, generation_config: Any) -> list[int]:
    """The tokens that end a completion: the tokenizer's end token, and all that the model declares."""
    declared = generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])}
    return sorted(ends - {None})
