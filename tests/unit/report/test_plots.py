"""The SVG: where points are, what is left out, and what it says without eyes."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from lpl.report.plots import MOST_POINTS, Line, Row, interval_chart, line_chart

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
    rows = [Row("a", "1", -2.0, -3.0, -1.0, noise=0.5), Row("b", "2", 1.0)]
    chart = interval_chart("t", "n", rows, "%", zero=True)
    (whisker,) = paths(chart.svg, "whisker")
    left, right = re.match(r"M([\d.]+) \d+H([\d.]+)", whisker).groups()  # type: ignore[union-attr]
    dots = [float(c.get("cx", "")) for c in parsed(chart.svg).iter(f"{SPACE}circle")]
    assert dots[0] == pytest.approx((float(left) + float(right)) / 2, abs=0.1)
    assert dots[1] > dots[0]
    assert chart.rows == [["a", "−2", "[−3, −1]", "0.5"], ["b", "1", "–", "–"]]
    assert chart.header == ["", "value", "95 % interval", "noise"]


def test_a_far_floor_is_told_at_the_edge() -> None:
    near = interval_chart("t", "n", [Row("a", "1", 10.0, 9.0, 11.0, mark=9.5)], "x")
    far = interval_chart("t", "n", [Row("a", "1", 10.0, 9.0, 11.0, mark=0.5)], "x")
    assert paths(near.svg, "mark")
    assert not paths(far.svg, "mark")
    assert "◂ 0.5" in far.svg
    assert far.rows[0][-1] == "0.5"
