"""The time left, from what stages took before and the pace of the ones that have run."""

from __future__ import annotations

import pytest

from stages.run import pace

SECONDS = {"prepare": 10.0, "sft": 30.0, "dpo": 60.0}


@pytest.fixture(autouse=True)
def _plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that began 80 seconds ago."""
    monkeypatch.setattr(pace.time, "time", lambda: 1000.0)
    for name, value in pace.announce(SECONDS).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(pace.time, "time", lambda: 1080.0)


def test_the_rest_is_scaled_by_the_pace_so_far() -> None:
    """40 s became 80; with 30 that went as planned it is 110 for 70, so the 60 s that are left become 94."""
    assert pace.time_left("sft") == "about 94 s left"


@pytest.mark.parametrize("stage", ["dpo", "evaluate@dpo"])
def test_nothing_is_left_after_the_last_stage_or_one_that_was_not_planned(stage: str) -> None:
    assert pace.time_left(stage) == ""


def test_a_stage_on_its_own_knows_nothing_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(pace.PLAN)
    assert pace.time_left("sft") == ""


def test_durations_are_words() -> None:
    assert [pace.words(seconds) for seconds in (14.4, 190, 7300)] == ["14 s", "3 min", "2.0 h"]
