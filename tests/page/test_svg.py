"""Charts have round ticks, and draw whatever numbers come."""

from __future__ import annotations

import pytest

from stages.page.svg import interval_chart, line_chart, ticks


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert all(3 <= x <= 7.5 for x in ticks(3, 7.5))


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [0.0, 0.0], [float("nan"), 3.0], [-1e-9, 1e9]])
def test_charts_draw_whatever_comes(values: list[float]) -> None:
    chart = line_chart("a < b", "step", [("x", list(range(len(values))), values)])
    assert chart.startswith("<svg") and "nan" not in chart and "a &lt; b" in chart


def test_charts_of_nothing() -> None:
    assert line_chart("t", "x", [("a", [1], [float("nan")])]) == ""
    assert interval_chart("t", []) == ""
