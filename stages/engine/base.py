"""One interface for generating text: requests go in, completions come out as they finish."""

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
    """What came of a request.

    `tokens` are the new token ids without the end token. `finish` is `stop` (the end token came) or
    `length`. `logprob` is the summed natural-log probability of all new tokens, the end token included,
    at temperature 1.
    """

    id: str
    tokens: tuple[int, ...]
    finish: Literal["stop", "length"]
    logprob: float


def plan(requests: Iterable[Request], size: int) -> list[list[Request]]:
    """The requests in pieces of at most `size`, short prompts first, those with one prompt side by side.

    The same list gives the same pieces, whichever of them are done and whoever completes them.
    """
    ordered = sorted(requests, key=lambda request: (len(request.prompt), request.prompt))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


class EngineStartError(RuntimeError):
    """An engine could not start. It ends a stage that has no other; among several, it costs one worker."""


class Engine(Protocol):
    """Something that can complete requests with one policy."""

    def generate(
        self, requests: Iterable[Request], done: frozenset[str] = frozenset()
    ) -> Iterator[Completion]:
        """Complete every request whose id is not in `done`, in whatever order they finish.

        All requests of a run are given also when it is resumed, so that an engine may plan alike.
        """
        ...


def request_seed(seed: int, *parts: str) -> int:
    """A request's own 63-bit seed, from the run's seed and what tells the request apart."""
    text = "/".join((str(seed), *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def end_ids(tokenizer: Any, generation_config: Any) -> list[int]:
    """The tokens that end a completion: the tokenizer's end token, and all that the model declares."""
    declared = generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])}
    return sorted(ends - {None})
