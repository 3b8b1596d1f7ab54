"""The statistics of changed questions: rates and their intervals, the drop, and two policies compared on the twins."""

from __future__ import annotations

from typing import Any

import pytest

from stages.stats.changed import changed_metrics
from stages.stats.one import bootstrap_interval, wilson
from stages.stats.p_value import mcnemar_p
from stages.stats.paired import compare_changed, smallest_visible_difference


def row(name: int, right: bool, *twins: bool) -> dict[str, Any]:
    asked = [{"id": f"q{name}~{place}", "correct": one} for place, one in enumerate(twins)]
    return {"id": f"q{name}", "correct": right, "twins": asked}


def table(*counts: tuple[int, bool, bool]) -> list[dict[str, Any]]:
    kinds = [kind for count, *kind in counts for _ in range(count)]
    return [row(name, right, twin) for name, (right, twin) in enumerate(kinds)]


def test_one_twin_a_question() -> None:
    """A question without a twin does not count, right or wrong."""
    rows = [*table((30, True, True), (10, True, False), (5, False, True), (5, False, False)), row(99, False)]
    made = changed_metrics(rows, 1)
    expected = {"changed": (35, 50), "both": (30, 50), "kept": (30, 40)}
    for name, (right, of) in expected.items():
        assert made[name] == pytest.approx(right / of)
        assert (made[f"{name}_low"], made[f"{name}_high"]) == wilson(right, of)
    assert made["unchanged"] == pytest.approx(40 / 50)
    assert made["changed_drop"] == pytest.approx(5 / 50)
    assert (made["changed_drop_low"], made["changed_drop_high"]) == bootstrap_interval(
        [1.0] * 10 + [-1.0] * 5 + [0.0] * 35, 1
    )
    assert (made["changed_questions"], made["changed_twins"]) == (50, 50)


def test_several_twins_of_a_question_are_averaged_first() -> None:
    """Each question counts once, and whole questions are resampled."""
    rows = [row(0, True, True, False, False, False), row(1, True, True), row(2, False, True, True)]
    made = changed_metrics(rows, 1)
    assert made["changed"] == pytest.approx((0.25 + 1 + 1) / 3)
    assert made["both"] == pytest.approx((0.25 + 1 + 0) / 3)
    assert made["kept"] == pytest.approx((0.25 + 1) / 2)
    assert (made["both_low"], made["both_high"]) == bootstrap_interval([0.25, 1.0, 0.0], 1)
    assert (made["changed_questions"], made["changed_twins"]) == (3, 7)


def test_nothing_asked_nothing_said() -> None:
    assert changed_metrics([{"id": "q", "correct": True}, row(1, True)], 1) == {}
    made = changed_metrics(table((3, False, True)), 1)
    assert made["changed"] == 1.0 and "kept" not in made


def test_two_policies_by_mcnemar() -> None:
    """`changed`: 8 gained, 1 lost. `both`: 12 gained, 1 lost, because the questions count too."""
    before = table((20, True, True), (1, True, True), (8, True, False), (4, False, True), (7, False, False))
    after = table((20, True, True), (1, True, False), (8, True, True), (4, True, True), (7, False, False))
    made = compare_changed(before, [*after, row(99, True, True)], ("SFT", "DPO"), 0)
    assert made["changed"]["questions"] == 40
    assert made["changed"]["p"] == mcnemar_p(8, 1)
    assert made["changed"]["smallest_visible"] == smallest_visible_difference(40, 9 / 40)
    assert made["both"]["difference"] == pytest.approx(11 / 40)
    assert made["both"]["p"] == mcnemar_p(12, 1)
    assert made["both"]["verdict"].startswith("DPO is better (p = 0.0034")


def test_two_policies_with_several_twins() -> None:
    before = [row(name, True, False, False, True) for name in range(12)]
    after = [row(name, True, True, True, True) for name in range(12)]
    made = compare_changed(before, after, ("a", "b"), 0)["changed"]
    assert made["difference"] == pytest.approx(2 / 3) and made["p"] == pytest.approx(2 / 2**12)


def test_other_twins_are_not_compared() -> None:
    """Twins drawn by another seed are other questions."""
    before, after = table((3, True, True)), table((3, True, True))
    for one in after:
        one["twins"][0]["id"] += "0"
    assert compare_changed(before, after, ("a", "b"), 0) == {}
    assert compare_changed(before, [{"id": "q0", "correct": True}], ("a", "b"), 0) == {}
