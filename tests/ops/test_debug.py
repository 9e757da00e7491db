"""The debug checks that operators share."""

import pytest
import torch

from dreamkernels.ops import debug


def test_the_flag_is_off_and_comes_back_as_it_was():
    assert not debug.debug_enabled()
    with debug.debug_checks():
        assert debug.debug_enabled()
        with debug.debug_checks(False):
            assert not debug.debug_enabled()
        assert debug.debug_enabled()
    assert not debug.debug_enabled()
    with pytest.raises(RuntimeError, match="inside"), debug.debug_checks():
        raise RuntimeError("inside")
    assert not debug.debug_enabled()


def test_the_flag_can_be_set_for_good():
    debug.set_debug(True)
    try:
        assert debug.debug_enabled()
    finally:
        debug.set_debug(False)
    assert not debug.debug_enabled()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_first_offender_is_named(dtype):
    values = torch.tensor([[0, 3, -100], [9, 4, 7]], dtype=dtype)
    debug.check_range("op", "labels", values, 0, 10, also=-100)
    with pytest.raises(ValueError, match=r"op: labels\[0, 2\] = -100 is out of range \(0 to 9\)$"):
        debug.check_range("op", "labels", values, 0, 10)
    with pytest.raises(ValueError, match=r"labels\[1, 0\] = 9 is out of range \(0 to 8, or -100\): the vocabulary"):
        debug.check_range("op", "labels", values, 0, 9, also=-100, meaning="the vocabulary has 9 entries")
    debug.check_range("op", "labels", values[:0], 5, 5)


def test_compiled_code_is_not_checked():
    seen = []

    def function(x):
        seen.append(debug.debug_enabled())
        return x + 1

    with debug.debug_checks():
        torch.compile(function, backend="eager")(torch.zeros(2))
        assert debug.debug_enabled()
    assert seen == [False]
