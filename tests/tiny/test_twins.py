"""The twins of generated problems: as other questions' twins are written, one or one for each number."""

from __future__ import annotations

from itertools import islice
from typing import Any, Literal

from stages.regime_w.changed import ChangeCounts
from stages.tiny.problems import problems
from stages.tiny.twins import generated_twins

ASKED = {
    f"platinum-{place:05d}": one.question for place, one in enumerate(islice(problems("platinum", 0), 60))
}


def made(change: Literal["one", "all"], seed: int = 17) -> tuple[list[dict[str, Any]], ChangeCounts]:
    counts = ChangeCounts()
    ids = [identity for identity in ASKED if identity != "platinum-00003"]  # a row that was cleaned away
    return list(generated_twins(ids, "platinum", 0, change, seed, counts)), counts


def test_a_twin_says_what_was_changed() -> None:
    twins, counts = made("one")
    assert counts.questions == 59 and counts.with_twin == counts.twins == len(twins) > 40
    assert counts.refused.total() == 59 - len(twins)
    for twin in twins:
        assert list(twin) == ["id", "of", "question", "gold", "change"]
        before, change = ASKED[twin["of"]], twin["change"]
        rest = before[change["start"] :]
        assert rest.startswith(change["from"])
        assert twin["question"] == before[: change["start"]] + change["to"] + rest[len(change["from"]) :]
        assert twin["gold"].isdigit() and twin["id"].startswith(f"{twin['of']}~")


def test_all_makes_one_for_each_number() -> None:
    one, counts = made("all")
    assert counts.twins == len(one) == len({twin["id"] for twin in one}) > counts.with_twin
    assert {twin["of"] for twin in one} == {twin["of"] for twin in made("one")[0]}


def test_the_seed_draws_them() -> None:
    assert made("one") == made("one") != made("one", 18)
