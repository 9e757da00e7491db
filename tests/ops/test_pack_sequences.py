"""Sequence packing: its properties, and that the compiled and the Python form are one function."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dreamkernels import libraries, pack_sequences
from dreamkernels.packing import pack_sequences_in_python

LENGTHS = st.lists(st.integers(0, 50), max_size=60).map(lambda values: np.array(values, dtype=np.int64))


@settings(deadline=None, max_examples=300)
@example(lengths=np.array([1, 50, 0, 0]), budget=50, look_ahead=2)
@given(lengths=LENGTHS, budget=st.integers(50, 120), look_ahead=st.integers(1, 70))
def test_properties(lengths, budget, look_ahead):
    bin_of, bins = pack_sequences(lengths, budget, look_ahead)
    assert bin_of.dtype == np.int64
    assert bin_of.shape == lengths.shape
    tokens = np.bincount(bin_of, weights=lengths, minlength=bins) if bins else np.zeros(0)
    assert len(tokens) == bins
    assert (tokens <= budget).all()
    assert sorted(set(bin_of.tolist())) == list(range(bins)), "every bin holds a sequence"
    # A sequence overtakes fewer than look_ahead earlier ones: the window never holds more.
    for i in range(len(lengths)):
        assert (bin_of[:i] > bin_of[i]).sum() < look_ahead
    # Nothing waits for ever: whatever has waited longest opens the next bin.
    for number in range(1, bins):
        assert np.flatnonzero(bin_of == number)[0] == np.flatnonzero(bin_of >= number)[0]
    # First fit: two consecutive bins could not have been one while every sequence was in view.
    if look_ahead >= len(lengths) and bins > 1:
        for first in range(bins - 1):
            later = lengths[bin_of == first + 1]
            assert tokens[first] + later[0] > budget


@settings(deadline=None, max_examples=300)
@given(lengths=LENGTHS, budget=st.integers(50, 120), look_ahead=st.integers(1, 70))
def test_compiled_and_python_forms_are_equal(lengths, budget, look_ahead):
    if libraries.EXTENSION is None:
        pytest.skip("dreamkernels._C was not built")
    found, expected = pack_sequences(lengths, budget, look_ahead), pack_sequences_in_python(lengths, budget, look_ahead)
    assert found[0].tolist() == expected[0].tolist()
    assert found[1] == expected[1]


def test_look_ahead_of_one_keeps_the_order():
    assert pack_sequences([4, 4, 1, 9, 1], 9, 1)[0].tolist() == [0, 0, 0, 1, 2]


def test_look_ahead_fills_bins():
    bin_of, bins = pack_sequences([6, 6, 6, 4, 4, 4], 10)
    assert bins == 3
    assert bin_of.tolist() == [0, 1, 2, 0, 1, 2]


def test_nothing_to_pack():
    bin_of, bins = pack_sequences(np.zeros(0, dtype=np.int64), 10)
    assert bin_of.shape == (0,)
    assert bins == 0


@pytest.mark.parametrize("pack", [pack_sequences, pack_sequences_in_python], ids=["compiled", "python"])
@pytest.mark.parametrize(
    ("lengths", "budget", "look_ahead", "message"),
    [
        ([3, 11, 12], 10, 4, "sequence 1 has 11 tokens, more than the budget of 10; raise the budget or shorten"),
        ([3, -1], 10, 4, "sequence 1 has length -1"),
        ([3], 0, 4, "budget must be at least 1"),
        ([3], 10, 0, "look_ahead must be at least 1"),
        ([[3]], 10, 4, "one-dimensional, not 2-d"),
    ],
)
def test_bad_arguments_are_named(pack, lengths, budget, look_ahead, message):
    with pytest.raises(ValueError, match=message):
        pack(np.array(lengths, dtype=np.int64), budget, look_ahead)


def test_lengths_must_be_integers():
    with pytest.raises(ValueError, match="must be integers, not float64"):
        pack_sequences([1.5], 10)
