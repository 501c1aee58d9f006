"""plot.py: line charts that hold their points and need nothing else."""
import re
import xml.etree.ElementTree as ElementTree

import pytest

from plot import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, blocks, legend, line_chart, ticks


@pytest.mark.parametrize("low, high", [(0, 1), (-3.2, 1), (1, 900), (0, 0), (5, 5), (-2, -2), (1e-9, 3e-9),
                                       (-1e6, 7), (1e-14, 3e-14), (0, 1e-30)])
def test_ticks_are_few_round_evenly_apart_and_hold_all(low, high):
    marks = ticks(low, high)
    assert 2 <= len(marks) <= 9 and marks[0] <= low and marks[-1] >= high
    step = marks[1] - marks[0]
    assert all(b - a == pytest.approx(step) for a, b in zip(marks, marks[1:]))
    assert f"{step:.1e}"[0] in "125"


def test_a_chart_is_xml_and_its_lines_lie_where_the_numbers_say():
    lines = {"one": [(0, 0.0), (10, 1.0)], "two": [(5, -1.0)]}
    svg = ElementTree.fromstring(line_chart("a < b", "step", "nats", lines))
    first, second = (line.get("points") for line in svg.iter("{http://www.w3.org/2000/svg}polyline"))
    bottom, top = HEIGHT - BOTTOM, TOP
    middle = (bottom + top) / 2  # of -1 … 1
    assert first == f"{LEFT:.1f},{middle:.1f} {WIDTH - RIGHT:.1f},{top:.1f}"
    assert second == f"{(LEFT + WIDTH - RIGHT) / 2:.1f},{bottom:.1f}"
    words = [text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a < b", "step", "nats", "one", "two"} <= set(words)


@pytest.mark.parametrize("low, high", [(1, 1 + 1e-15), (1e16, 1e16 + 4), (-3, -3), (0, 5e-324)])
def test_numbers_that_are_all_but_equal_make_a_line_too(low, high):
    svg = ElementTree.fromstring(line_chart("t", "x", "y", {"a": [(1, low), (2, high)]}))
    points = svg.find("{http://www.w3.org/2000/svg}polyline").get("points")
    (_, one), (_, other) = (map(float, point.split(",")) for point in points.split())
    assert one == pytest.approx(other, abs=0.1) and TOP <= one <= HEIGHT - BOTTOM


def test_infinite_points_are_left_out_and_no_points_are_no_error():
    assert "nan" not in line_chart("t", "x", "y", {"a": [(1, float("nan")), (2, 1.0)]})
    ElementTree.fromstring(line_chart("t", "x", "y", {"a": []}))


def test_nothing_is_fetched_from_elsewhere():
    addresses = re.findall(r"https?://\S+", line_chart("t", "x", "y", {"a": [(0, 1)]}))
    assert addresses == ['http://www.w3.org/2000/svg"'], "a name of the format, not an address that is asked"


SVG = "{http://www.w3.org/2000/svg}"


def test_in_a_page_the_axes_hold_levels_rings_and_faint_lines_too():
    text = line_chart("a < b", "step", "nats", {"one": [(0, 0.0), (10, 1.0)]}, faint={"one": [(0, 4.0)]},
                      marks={"one": [(20, 0.0)], "two": [(0, 1.0)]}, levels={"xz": -4.0}, about="1 & 2")
    svg = ElementTree.fromstring(text)
    assert svg.find(f"{SVG}title").text == "a < b"
    assert svg.find(f"{SVG}desc").text == "1 & 2" and svg.find(f"{SVG}style") is None, "a page has it once"
    faint, line = (each.get("points") for each in svg.iter(f"{SVG}polyline"))
    assert faint == f"{LEFT:.1f},{TOP:.1f}", "4 is the highest tick"
    assert line.endswith(f"{(LEFT + WIDTH - RIGHT) / 2:.1f},{TOP + 3 / 8 * (HEIGHT - TOP - BOTTOM):.1f}")
    level, = (each for each in svg.iter(f"{SVG}line") if each.get("class") == "level")
    assert float(level.get("y1")) == HEIGHT - BOTTOM, "-4 is the lowest"
    rings = [(float(ring.get("cx")), ring.get("class")) for ring in svg.iter(f"{SVG}circle")]
    assert rings == [(WIDTH - RIGHT, "mark c0"), (LEFT, "mark c1")], "of the colour of the line of their name"


def test_many_lines_are_told_apart():
    text = line_chart("t", "x", "y", {str(i): [(0, i), (1, i)] for i in range(25)}, about="")
    kinds = {(line.get("stroke"), line.get("stroke-dasharray"))
             for line in ElementTree.fromstring(text).iter(f"{SVG}polyline")}
    assert len(kinds) == 25
    assert "<b>" not in legend({"<b>": [(0, 1)]}, {})


def test_blocks_by_hand():
    assert blocks([1.0, 0.75, 0.5, 1 / 16, 0.0], 2) == ["█▄", "███▁"], "halves of two rows are whole blocks"
