"""Draws the next token of each row: the likeliest one, or by the row's own stream of uniform numbers.

    draws = Draws(requests, device)
    token_ids = draws.next_tokens(logits, rows, step)

The stream follows from the request's seed, so a request gets the same tokens whatever it is computed together with.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from stages.policy.request import Request

LIKELIEST = 256  # tokens among which a nucleus is looked for first; to sort a whole vocabulary takes long


class Draws:
    """The settings of a batch of requests, and the uniform numbers that decide their tokens."""

    def __init__(self, batch: Sequence[Request], device: torch.device) -> None:
        self.temperature = torch.tensor([request.temperature for request in batch], device=device)
        self.top_p = torch.tensor([request.top_p for request in batch], device=device)
        self.sampled = bool((self.temperature > 0).any())
        self.nucleus = bool((self.top_p < 1).any())
        if self.sampled:
            limit = max(request.max_new_tokens for request in batch)
            streams = np.zeros((len(batch), limit), np.float32)
            for row, request in enumerate(batch):
                streams[row, : request.max_new_tokens] = uniform_stream(request)
            self.uniform = torch.from_numpy(streams).to(device)

    def next_tokens(self, logits: torch.Tensor, rows: torch.Tensor, step: int) -> torch.Tensor:
        """Token ids (rows,) from logits (rows, vocabulary); `rows` says which requests are still going."""
        if not self.sampled:
            return logits.argmax(-1)
        top_p = self.top_p[rows] if self.nucleus else None
        return draw(logits, self.temperature[rows], top_p, self.uniform[rows, step])


def uniform_stream(request: Request) -> np.ndarray:
    """One uniform number in [0, 1) for each token of a request; float32, shape (max_new_tokens,)."""
    return np.random.Generator(np.random.Philox(request.seed)).random(request.max_new_tokens, np.float32)


def draw(
    logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor | None, uniform: torch.Tensor
) -> torch.Tensor:
    """Token ids (rows,) from logits (rows, vocabulary), by inverting the cumulative distribution.

    A row of temperature 0 takes the likeliest token. `top_p` None draws from the whole vocabulary. Where rounding
    points to a token of probability 0, the likeliest one is taken too: a GPU adds up in blocks, so its cumulative sums
    do not rise everywhere (on a CPU they do).
    """
    probabilities = (logits / temperature.clamp(min=1e-6)[:, None]).softmax(-1)
    if top_p is not None:
        probabilities = _nucleus(probabilities, top_p)
    cumulative = probabilities.cumsum(-1)
    target = uniform[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[-1] - 1)
    possible = probabilities.gather(1, drawn)[:, 0] > 0
    return torch.where((temperature > 0) & possible, drawn[:, 0], logits.argmax(-1))


def _nucleus(probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Zero every token outside the nucleus: the smallest set with total probability `top_p` (Holtzman et al. 2020).

    A token as likely as the least likely one inside also counts as inside. So comparing with that least probability
    is enough. Scattering the sorted tokens back would sort them a second time on a GPU in deterministic mode.

    Nearly every nucleus lies within the likeliest `LIKELIEST` tokens, so these are tried first; only a row whose
    nucleus may be larger has its whole vocabulary sorted.
    """
    count = min(LIKELIEST, probabilities.shape[-1])
    least, larger = _least_inside(probabilities.topk(count).values, top_p)
    larger &= top_p < 1
    if count < probabilities.shape[-1] and larger.any():
        ranked = probabilities[larger].sort(dim=-1, descending=True).values
        least[larger] = _least_inside(ranked, top_p[larger])[0]
    least = least.where(top_p < 1, 0.0)
    return probabilities.where(probabilities >= least[:, None], 0.0)


def _least_inside(ranked: torch.Tensor, top_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row of falling probabilities, the least one inside the nucleus, and whether that is the row's last."""
    inside = (ranked.cumsum(-1) - ranked) < top_p[:, None]
    count = inside.sum(-1, keepdim=True).clamp(min=1)
    return ranked.gather(1, count - 1)[:, 0], count[:, 0] == ranked.shape[-1]
