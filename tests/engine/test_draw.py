"""Drawing tokens: what is never drawn, however the sums are rounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stages.policy.draw import LIKELIEST, draw

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


@pytest.mark.parametrize(
    "width", [LIKELIEST // 2, 8 * LIKELIEST], ids=["small vocabulary", "large vocabulary"]
)
@pytest.mark.parametrize("spread", [0.1, 8.0], ids=["flat", "peaked"])
def test_a_nucleus_is_that_of_the_whole_sorted_vocabulary(width: int, spread: float) -> None:
    """Where the likeliest tokens tried first hold it, and where they do not (flat, large)."""
    random = torch.Generator().manual_seed(5)
    logits = spread * torch.randn(ROWS, width, generator=random)
    top_p = torch.rand(ROWS, generator=random).mul(0.98).add(0.01)
    top_p[::8] = 1.0  # no nucleus
    uniform = torch.rand(ROWS, generator=random)
    drawn = draw(logits, torch.ones(ROWS), top_p, uniform)
    assert torch.equal(drawn[::8], draw(logits, torch.ones(ROWS), None, uniform)[::8])
    lowest = draw(logits, torch.ones(ROWS), top_p, torch.zeros(ROWS))
    highest = draw(logits, torch.ones(ROWS), top_p, torch.full((ROWS,), LARGEST))
    for row in range(ROWS):
        ranked = logits[row].softmax(-1).sort(descending=True)
        inside = (ranked.values.cumsum(-1) - ranked.values) < top_p[row]
        nucleus = set(ranked.indices[inside].tolist())
        assert drawn[row].item() in nucleus
        if top_p[row] < 1:
            assert (lowest[row].item(), highest[row].item()) == (min(nucleus), max(nucleus))
