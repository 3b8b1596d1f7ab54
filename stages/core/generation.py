"""Generation that survives a kill: completions go to a journal as they finish."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from stages.core.records import Journal
from stages.engine.base import Engine, Request

FLUSH_SECONDS = 2.0


def complete(
    engine: Engine,
    tokenizer: Any,
    requests: Iterable[Request],
    journal: Journal,
    advance: Callable[..., None],
    opening: str = "",
) -> dict[str, dict[str, Any]]:
    """Complete all `requests`, those in `journal` excepted; returns `{id, text, tokens, finish, logprob}` by id.

    `text` begins with `opening`, what the prompt has already written of the answer; `tokens` counts the new
    tokens without the end token. Raises RuntimeError when the engine gives back fewer completions than were
    asked for.
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
