"""Charts: honest axes and valid SVG."""

import math
import re
from xml.etree import ElementTree

import pytest

from dreamllm.evaluation.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MOST_POINTS,
    RIGHT,
    TOP,
    WIDTH,
    interval_chart,
    line_chart,
    moving_average,
    nice_ticks,
)


def points(svg, name):
    (path,) = (e for e in ElementTree.fromstring(svg) if e.get("class") == name)
    return [tuple(map(float, pair)) for pair in re.findall(r"([\d.]+),([\d.]+)", path.get("d"))]


@pytest.mark.parametrize(
    ("largest", "ticks"),
    [(1.0, [0, 0.25, 0.5, 0.75, 1.0]), (3.7, [0, 1, 2, 3, 4]), (0.034, [0, 0.01, 0.02, 0.03, 0.04]), (0.0, [0, 1])],
)
def test_ticks_are_round_and_begin_at_zero(largest, ticks):
    assert nice_ticks(largest) == ticks


@pytest.mark.parametrize("exponent", range(-6, 7))
@pytest.mark.parametrize("digit", [1.0, 1.01, 2.3, 4.99, 7.2, 9.99])
def test_ticks_cover_every_magnitude(exponent, digit):
    largest = digit * 10.0**exponent
    ticks = nice_ticks(largest)
    assert ticks[0] == 0
    assert 2 <= len(ticks) <= 5
    assert ticks[-2] < largest <= ticks[-1] * (1 + 1e-9)


def test_points_stand_where_their_values_are():
    """Linear axes from zero: half the top tick is half way up, half the steps half way along."""
    drawn = points(line_chart([0, 50, 100], [4.0, 2.0, 0.0], "loss"), "raw")
    left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM
    middle = ((left + right) / 2, (top + bottom) / 2)
    for found, expected in zip(drawn, [(left, top), middle, (right, bottom)], strict=True):
        assert found == pytest.approx(expected, abs=0.1)


def test_a_long_run_is_thinned_to_group_means():
    count = 10 * MOST_POINTS
    drawn = points(line_chart(range(1, count + 1), [1.0] * count, "loss"), "raw")
    assert len(drawn) == MOST_POINTS
    assert drawn[-1][0] == pytest.approx(WIDTH - RIGHT, abs=0.1)
    assert len({y for _, y in drawn}) == 1


def test_one_point_is_a_chart():
    assert len(points(line_chart([1], [0.5], "loss"), "curve")) == 1


def test_moving_average():
    assert moving_average([1, 2, 6, 4, 5], 3) == [1, 3, 4, 5, 5]
    assert moving_average([1, 2], 1) == [1, 2]


@pytest.mark.parametrize(("steps", "values"), [([], []), ([1], [1.0, 2.0]), ([1], [math.nan])])
def test_what_is_no_curve_is_refused(steps, values):
    with pytest.raises(ValueError, match="loss: a curve needs"):
        line_chart(steps, values, "loss")


def test_a_share_is_shown_on_the_whole_scale():
    shown = interval_chart(0.9, (0.85, 0.95), 0.93)
    for part in ("width:90.00%", "left:85.00%;width:10.00%", "left:93.00%"):
        assert part in shown
    assert "target" not in interval_chart(0.9, (0.85, 0.95), None)


@pytest.mark.parametrize("values", [[0.01, 0.0075], [9.55e-4, 9.55e-4], [-0.0, 12345.0], [7.2, 7.22]])
def test_no_label_is_cut_off(values):
    """By the width of a digit in a browser's usual sans-serif: 0.64 of its size, bold."""
    svg = ElementTree.fromstring(line_chart(range(1, len(values) + 1), values, "x"))
    for label in (e for e in svg if e.tag == "text"):
        at, wide = float(label.get("x")), 6.4 * len(label.text)
        begin = at - wide * {"end": 1.0, "middle": 0.5}.get(label.get("text-anchor"), 0.0)
        assert begin >= 0
        assert begin + wide <= WIDTH
