"""Drawing tokens: what is never drawn, however the sums are rounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stages.policy.draw import draw

VOCABULARY, ROWS = 64, 400
LARGEST = 1 - 2**-24  # the largest uniform number there is in 32 bits


def draw_all(logits: torch.Tensor, uniform: torch.Tensor, top_p: float | None = None) -> torch.Tensor:
    """The probability that each drawn token has, with a nucleus or without."""
    rows = len(logits)
    nucleus = torch.full((rows,), top_p) if top_p else None
    drawn = draw(logits, torch.ones(rows), nucleus, uniform)
    return logits.softmax(-1).gather(1, drawn[:, None])[:, 0]


def test_sums_that_do_not_rise_point_to_no_impossible_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU adds up in blocks, so sums over tokens of probability 0 go up and down by a rounding."""
    random = torch.Generator().manual_seed(2)
    logits = torch.randn(ROWS, VOCABULARY, generator=random)
    logits[:, ::2] = -torch.inf
    exact = torch.Tensor.cumsum

    def in_blocks(values: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        sums = exact(values, *args, **kwargs)
        return sums * (1 + 6e-8 * torch.randint(-1, 2, sums.shape, generator=random))

    # Targets at the sums themselves, where a rounding decides.
    places = torch.randint(0, VOCABULARY, (ROWS,), generator=random)
    sums = exact(logits.softmax(-1), -1)
    uniform = sums[torch.arange(ROWS), places].clamp(max=LARGEST)
    monkeypatch.setattr(torch.Tensor, "cumsum", in_blocks)
    assert (draw_all(logits, uniform) > 0).all()


def test_what_rounding_cannot_touch_is_drawn_by_the_sums() -> None:
    """0.5, 0, 0.5: the middle is never drawn, and each end by its half."""
    logits = torch.tensor([[0.0, -torch.inf, 0.0]]).expand(4, 3)
    uniform = torch.tensor([0.0, 0.49, 0.51, LARGEST])
    assert draw(logits, torch.ones(4), None, uniform).tolist() == [0, 0, 2, 2]
    assert draw(logits, torch.zeros(4), None, uniform).tolist() == [0, 0, 0, 0]
