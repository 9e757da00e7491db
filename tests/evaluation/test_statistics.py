"""Proportions and their intervals."""

import pytest

from dreamllm.evaluation import Proportion


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval_as_published(right, total, low, high):
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    assert Proportion(right, total).interval == pytest.approx((low, high), abs=5e-5)


def test_the_interval_mirrors_and_stays_inside():
    low, high = Proportion(20, 20).interval
    assert (low, high) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)
    assert high <= 1.0


@pytest.mark.parametrize(("right", "total"), [(0, 0), (3, 2), (-1, 5)])
def test_what_is_no_proportion_is_refused(right, total):
    with pytest.raises(ValueError, match=f"{right} of {total} is not a proportion"):
        Proportion(right, total)


def test_as_json_and_as_text():
    value = Proportion(15, 148)
    assert value.to_json() == {"right": 15, "total": 148, "share": 0.101351, "interval_95": [0.062386, 0.160487]}
    assert str(value) == "10.1% (15 of 148, 95% interval 6.2% to 16.0%)"
