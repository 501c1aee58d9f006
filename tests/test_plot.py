"""plot.py: line charts that hold their points and need nothing else."""
import re
import xml.etree.ElementTree as ElementTree

import pytest

from plot import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, line_chart, ticks


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
