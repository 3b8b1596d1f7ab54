"""How sure the policy was of a text: its mean token probability, which costs nothing and is the signals' rival."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# Chosen on validation questions (bench/vote.py): of 1 to 1000 the best for the vote, alone and with s_cf.
POWER = 64


def mean_logprob(row: Mapping[str, Any]) -> float | None:
    """The mean token log-probability of a trajectory or sample; None without `logprob` or `tokens`, or if that is 0."""
    logprob, tokens = row.get("logprob"), row.get("tokens")
    if not isinstance(logprob, int | float) or not isinstance(tokens, int) or not tokens:
        return None
    return logprob / tokens


def probability(row: Mapping[str, Any]) -> float | None:
    """The mean token probability to the power of POWER, in [0, 1]; 0 for a text of no tokens, None when not known."""
    if row.get("tokens") == 0:
        return 0.0
    mean = mean_logprob(row)
    return None if mean is None else math.exp(POWER * min(0.0, mean))
