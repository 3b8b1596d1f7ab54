"""Which training questions a round of rollouts asks: those that no earlier round asked, as long as there are any."""

from __future__ import annotations

import random
from collections.abc import Sequence


def pick_questions(size: int, counts: Sequence[int | None], seed: int) -> Sequence[int]:
    """The places of the questions that a round asks, of `size` problems, in order.

    `counts` are the questions of each round up to this one (None: all). The first round draws its own by `seed`. Each
    later round takes the next ones of what is left, in an order drawn by `seed`; when all were asked, it goes on with
    those asked first.
    """
    wanted = [size if count is None else min(count, size) for count in counts]
    order = random.Random(f"{seed}/rollout").sample(range(size), wanted[0])
    if len(wanted) > 1:
        left = sorted(set(range(size)) - set(order))
        random.Random(f"{seed}/rollout/later").shuffle(left)
        order += left
    asked = sum(wanted[:-1])
    return sorted(order[(asked + place) % len(order)] for place in range(wanted[-1]))
