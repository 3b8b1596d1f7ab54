"""Which questions each round asks."""

from __future__ import annotations

import random

from stages.policy.questions import pick_questions
from stages.policy.request import request_seed, rollout_seed


def test_the_first_round_asks_what_a_single_one_asked() -> None:
    wanted = sorted(random.Random("17/rollout").sample(range(1000), 500))
    assert pick_questions(1000, [500], 17) == wanted
    assert pick_questions(20, [None], 17) == pick_questions(20, [99], 17) == list(range(20))


def test_later_rounds_ask_others_as_long_as_there_are_any() -> None:
    one, two, three = (pick_questions(10, [4, 3, 5][:n], 1) for n in (1, 2, 3))
    assert (len(one), len(two), len(three)) == (4, 3, 5)
    assert not set(one) & set(two) and set(one) | set(two) | set(three) >= set(range(10))
    assert len(set(three) & set(one)) == 2 and not set(three) & set(two)  # those asked first, again
    assert len(set(pick_questions(10, [None, 4], 1))) == 4


def test_only_later_rounds_have_their_name_in_the_seeds() -> None:
    assert rollout_seed(3, "", "q", "0") == request_seed(3, "rollout", "q", "0")
    assert rollout_seed(3, "round2", "q", "0") == request_seed(3, "rollout", "round2", "q", "0")
