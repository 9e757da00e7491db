"""resize_crop has the bits of Pillow's resize and crop."""

from __future__ import annotations

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dreamkernels import libraries, resize_crop, resizes_pictures

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
SIDE = st.integers(1, 90)


def picture(width: int, height: int, seed: int = 0, extreme: bool = False) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if extreme:  # overshoots most
        return rng.integers(0, 2, (height, width, 3), dtype=np.uint8) * 255
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def resized(
    array: np.ndarray, size: tuple[int, int], window: tuple[int, int, int, int], resample: str, down_first: bool
):
    return resize_crop(array, size, window, resample, np.empty((window[3], window[2], 3), np.uint8), down_first)


def in_steps(array: np.ndarray, size: tuple[int, int], resample: str, down_first: bool) -> np.ndarray:
    """Pillow along one direction and then along the other: whatever its version, the order is given."""
    image = Image.fromarray(array)
    middle = (image.width, size[1]) if down_first else (size[0], image.height)
    return np.asarray(image.resize(middle, FILTERS[resample]).resize(size, FILTERS[resample]))


@settings(deadline=None, max_examples=200)
@given(
    before=st.tuples(SIDE, SIDE),
    after=st.tuples(SIDE, SIDE),
    resample=st.sampled_from(sorted(FILTERS)),
    down_first=st.booleans(),
    extreme=st.booleans(),
    data=st.data(),
)
def test_any_window_of_any_size_has_pillows_bits(before, after, resample, down_first, extreme, data):
    array = picture(*before, seed=before[0], extreme=extreme)
    left, top = data.draw(st.integers(0, after[0] - 1)), data.draw(st.integers(0, after[1] - 1))
    window = (left, top, data.draw(st.integers(1, after[0] - left)), data.draw(st.integers(1, after[1] - top)))
    expected = in_steps(array, after, resample, down_first)[top : top + window[3], left : left + window[2]]
    assert np.array_equal(resized(array, after, window, resample, down_first), expected)


USUAL = [((576, 720), (512, 640)), ((1000, 333), (672, 224)), ((100, 130), (512, 666))]


@pytest.mark.parametrize("resample", FILTERS)
@pytest.mark.parametrize(("before", "after"), USUAL)
def test_pictures_of_the_usual_sizes_have_pillows_bits(before, after, resample):
    array = picture(*before)
    expected = np.asarray(Image.fromarray(array).resize(after, FILTERS[resample]))
    assert np.array_equal(resized(array, after, (0, 0, *after), resample, False), expected)


@pytest.mark.parametrize("down_first", [False, True])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_instruction_set_gives_the_same_bits(level, down_first):
    """The best of the processor up to that level: scalar, AVX2, AVX-512."""
    for width, height in ((97, 61), (64, 131), (5, 4), (300, 7)):
        array, size, window = picture(width, height), (71, 67), (3, 5, 66, 59)
        out = np.empty((59, 66, 3), np.uint8)
        libraries.EXTENSION.resize_crop(array, size, window, True, down_first, out, most_level=level)
        expected = in_steps(array, size, "bicubic", down_first)[5:64, 3:69]
        assert np.array_equal(out, expected)


@pytest.mark.skipif(int(PIL.__version__.partition(".")[0]) < 13, reason="Pillow resized along the width first")
@pytest.mark.parametrize("above", [0, 1])
@pytest.mark.parametrize("resample", FILTERS)
def test_pillow_takes_the_order_that_is_documented(resample, above):
    width, columns, rows = 40, 31, 25
    array = picture(width, rows + 2 * (width - columns) + above, extreme=True)
    expected = np.asarray(Image.fromarray(array).resize((columns, rows), FILTERS[resample]))
    found = [resized(array, (columns, rows), (0, 0, columns, rows), resample, first) for first in (False, True)]
    assert np.array_equal(found[above], expected)
    assert not np.array_equal(found[1 - above], expected)


def test_a_picture_that_is_not_contiguous_is_taken_as_it_looks():
    array = picture(40, 30)
    turned = array[::-1, ::2]
    assert np.array_equal(
        resized(turned, (10, 9), (1, 2, 5, 6), "bicubic", False),
        resized(turned.copy(), (10, 9), (1, 2, 5, 6), "bicubic", False),
    )


GOOD = {"picture": picture(6, 5), "size": (4, 4), "window": (0, 0, 4, 4), "resample": "bilinear"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"resample": "nearest"}, "resample must be 'bilinear' or 'bicubic', not 'nearest'"),
        ({"picture": picture(6, 5).astype(np.float32)}, "picture must be uint8, not float32"),
        ({"picture": picture(6, 5)[..., 0]}, r"picture must be bytes \[H, W, 3\]"),
        ({"picture": picture(6, 5)[:0]}, r"picture must be bytes \[H, W, 3\]"),
        ({"size": (0, 4)}, "size must be at least 1 x 1"),
        ({"window": (1, 0, 4, 4)}, "the window must lie inside"),
        ({"window": (-1, 0, 4, 4)}, "the window must lie inside"),
        ({"window": (0, 0, 0, 4)}, "the window must lie inside"),
        ({"out": np.empty((4, 3, 3), np.uint8)}, "out must have the shape of the window"),
        ({"out": np.empty((4, 4, 3), np.int8)}, "out must be uint8, not int8"),
        ({"out": np.empty((4, 8, 3), np.uint8)[:, ::2]}, "out must be contiguous"),
    ],
)
def test_bad_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        resize_crop(**{**GOOD, "out": np.empty((4, 4, 3), np.uint8), **changed})


def test_without_the_compiled_module_it_says_so(monkeypatch):
    assert resizes_pictures()
    monkeypatch.setattr(libraries, "EXTENSION", None)
    assert not resizes_pictures()
    with pytest.raises(RuntimeError, match="needs the compiled module"):
        resize_crop(**GOOD, out=np.empty((4, 4, 3), np.uint8))
