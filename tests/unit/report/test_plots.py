"""The SVG: where points are, what is left out, and what it says without eyes."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from lpl.report.charts import IntervalRow, Line
from lpl.report.numbers import short
from lpl.report.plots import MOST_POINTS, Scale, interval_chart, line_chart, scale_for

SPACE = "{http://www.w3.org/2000/svg}"


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def paths(svg: str, kind: str) -> list[str]:
    return [p.get("d", "") for p in parsed(svg).iter(f"{SPACE}path") if kind in p.get("class", "").split()]


def numbers(path: str) -> list[tuple[float, float]]:
    return [(float(a), float(b)) for a, b in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path)]


def test_a_line_goes_through_its_points() -> None:
    chart = line_chart("Loss", "Lower is better.", [Line("a", "1", [0, 10, 20], [1.0, 3.0, 2.0])], "steps", "loss")
    (first, second, third) = numbers(paths(chart.svg, "line")[0])
    assert second[0] == pytest.approx((first[0] + third[0]) / 2, abs=0.1)
    assert third[1] == pytest.approx((first[1] + second[1]) / 2, abs=0.1)
    assert second[1] < first[1]  # up is more
    assert chart.rows == [["0", "1"], ["10", "3"], ["20", "2"]]
    assert chart.header == ["steps", "a"]


def test_gaps_break_the_line() -> None:
    chart = line_chart("t", "n", [Line("a", "1", [0, 1, 2, 3], [1.0, None, 2.0, 3.0])], "x", "y")
    assert paths(chart.svg, "line")[0].count("M") == 2
    assert chart.rows[1] == ["1", "–"]


def test_what_has_no_place_is_left_out() -> None:
    line = Line("a", "1", [0, 1, 2, 3], [0.0, float("nan"), 2.0, 20.0])
    chart = line_chart("t", "n", [line], "x", "y", log_x=True, log_y=True)
    assert len(numbers(paths(chart.svg, "line")[0])) == 2
    assert "nan" not in chart.svg


def test_nothing_to_draw_is_no_fault() -> None:
    assert "<svg" in line_chart("t", "n", [Line("a", "1", [], [])], "x", "y", log_y=True).svg


def test_long_lines_are_thinned_by_means() -> None:
    n = 10 * MOST_POINTS
    chart = line_chart("t", "n", [Line("a", "1", list(range(n)), [float(i % 2) for i in range(n)])], "x", "y")
    places = numbers(paths(chart.svg, "line")[0])
    assert len(places) == MOST_POINTS
    assert len({y for _, y in places}) == 1  # every mean of ten is a half
    assert len(chart.rows) <= 41
    assert chart.thinned == "every 6. point"


def test_text_is_escaped_and_says_what_is_seen() -> None:
    chart = line_chart("A <b>", "n & m", [Line('"x" <', "1", [0, 5], [1.0, 2.0])], "x", "y")
    root = parsed(chart.svg)
    assert root.find(f"{SPACE}title").text == "A <b>"  # type: ignore[union-attr]
    assert '"x" <: from 1 at 0 to 2 at 5' in root.find(f"{SPACE}desc").text  # type: ignore[union-attr,operator]
    ids = re.findall(r'id="(\w+)"', chart.svg)
    assert root.get("aria-labelledby") == " ".join(ids)
    assert root.get("role") == "img"


def test_bands_close_around_the_line() -> None:
    line = Line("a", "2", [0, 1], [1.0, 2.0], [0.5, 1.5], [1.5, 2.5])
    (band,) = paths(line_chart("t", "n", [line], "x", "y").svg, "band")
    assert len(numbers(band)) == 4
    assert band.endswith("Z")


def test_intervals() -> None:
    rows = [IntervalRow("a", "1", -2.0, -3.0, -1.0, noise=0.5), IntervalRow("b", "2", 1.0)]
    chart = interval_chart("t", "n", rows, "%", zero=True)
    (whisker,) = paths(chart.svg, "whisker")
    left, right = re.match(r"M([\d.]+) \d+H([\d.]+)", whisker).groups()  # type: ignore[union-attr]
    dots = [float(c.get("cx", "")) for c in parsed(chart.svg).iter(f"{SPACE}circle")]
    assert dots[0] == pytest.approx((float(left) + float(right)) / 2, abs=0.1)
    assert dots[1] > dots[0]
    assert chart.rows == [["a", "−2", "[−3, −1]", "0.5"], ["b", "1", "–", "–"]]
    assert chart.header == ["", "value", "95 % interval", "noise"]


def test_a_far_floor_is_told_at_the_edge() -> None:
    near = interval_chart("t", "n", [IntervalRow("a", "1", 10.0, 9.0, 11.0, mark=9.5)], "x")
    far = interval_chart("t", "n", [IntervalRow("a", "1", 10.0, 9.0, 11.0, mark=0.5)], "x")
    assert paths(near.svg, "mark")
    assert not paths(far.svg, "mark")
    assert "◂ 0.5" in far.svg
    assert far.rows[0][-1] == "0.5"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (0, "0"), (1.5, "1.5"), (-0.25, "−0.25"), (12, "12"), (123.4, "123"), (1000, "1000"), (9999.4, "9999"),
        (12345, "12.3k"), (2.5e6, "2.5M"), (3e9, "3G"), (0.00123, "0.00123"), (0.00006, "6e−5"), (1.234e-7, "1.23e−7"),
        (999.6, "1000"), (99.96, "100"), (9999.6, "10k"), (999_999, "1M"), (-999.96e6, "−1G"), (0.0009996, "0.001"),
        (2.5e12, "2.5T"), (3e15, "3e15"), (None, "–"), (float("nan"), "–"), (float("inf"), "–"),
    ],
)  # fmt: skip
def test_numbers_for_readers(value: float | None, told: str) -> None:
    assert short(value) == told


def test_digits() -> None:
    assert short(0.065432, 2) == "0.065"
    assert short(0.065432, 4) == "0.06543"


def test_places_on_straight_and_logarithmic_scales() -> None:
    straight, log = Scale(0, 10, 100, 200), Scale(0.01, 100, 0, 400, log=True)
    assert [straight(v) for v in (0, 5, 10)] == [100, 150, 200]
    assert [log(v) for v in (0.01, 1, 100)] == pytest.approx([0, 200, 400])


def test_ticks_are_round_and_inside() -> None:
    assert Scale(0, 10, 0, 1).ticks(5) == [0, 2, 4, 6, 8, 10]
    assert Scale(-0.31, 0.29, 0, 1).ticks(6) == pytest.approx([-0.3, -0.2, -0.1, 0, 0.1, 0.2])
    assert Scale(0.002, 300, 0, 1, True).ticks(6) == pytest.approx([0.01, 0.1, 1, 10, 100])
    assert Scale(0.02, 0.3, 0, 1, True).ticks(5) == pytest.approx([0.02, 0.05, 0.1, 0.2])


def test_scales_hold_every_value_even_a_single_one() -> None:
    for values in ([3.0], [0.0], [-1.0, 5.0], []):
        scale = scale_for(values, 0, 1)
        assert scale.low < scale.high
        assert all(scale.low <= v <= scale.high for v in values)
    assert scale_for([2.0, 5.0], 0, 1, zero=True).low == 0
    assert (scale_for([0.0], 0, 1, zero=True).low, scale_for([0.0], 0, 1, zero=True).high) == (0, 1)
    log = scale_for([0.1, 0.1], 0, 1, log=True)
    assert 0 < log.low < 0.1 < log.high
