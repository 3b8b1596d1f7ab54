"""Generates so that a kill loses nothing: every completion goes to a journal as soon as it is finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from stages.policy.request import Engine, Request
from stages.run.journal import Journal

FLUSH_SECONDS = 2.0


def complete(
    engine: Engine,
    tokenizer: Any,
    requests: Iterable[Request],
    journal: Journal,
    advance: Callable[..., None],
    opening: str = "",
) -> dict[str, dict[str, Any]]:
    """Complete the `requests` that are not in `journal`; returns `{id, text, tokens, finish, logprob}` of all, by id.

    `text` begins with `opening`, the part of the answer that the prompt has already written. `tokens` counts the new
    tokens without the end token. Raises RuntimeError when the engine returns fewer completions than requests.
    """
    requests = list(requests)
    done = frozenset(request.id for request in requests if request.id in journal.records)
    flushed = time.monotonic()
    for completion in engine.generate(requests, done):
        journal.add(
            {
                "id": completion.id,
                "text": opening + tokenizer.decode(completion.tokens, skip_special_tokens=True),
                "tokens": len(completion.tokens),
                "finish": completion.finish,
                "logprob": completion.logprob,
            }
        )
        advance()
        if time.monotonic() - flushed > FLUSH_SECONDS:
            journal.flush()
            flushed = time.monotonic()
    journal.flush()
    missing = [request.id for request in requests if request.id not in journal.records]
    if missing:
        raise RuntimeError(
            f"the engine gave no completion for {len(missing)} requests, {missing[0]} the first"
        )
    return {request.id: journal.records[request.id] for request in requests}
