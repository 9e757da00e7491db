"""Sequence packing: which sequences share one packed pass of a fixed token budget."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dreamkernels import libraries


def pack_sequences(lengths: npt.ArrayLike, budget: int, look_ahead: int = 256) -> tuple[npt.NDArray[np.int64], int]:
    """Assigns each sequence to a bin of at most `budget` tokens: first fit with look-ahead.

    Sequences are taken in order. A bin is filled from the next `look_ahead` sequences that have no bin yet, earliest
    first, and is closed when none of them fits; the one that has waited longest opens the next bin. look_ahead=1 keeps
    the order strictly. The result depends on the arguments alone.

    Args:
        lengths: integers [N], tokens per sequence; may be zero.
        budget: tokens per bin.
        look_ahead: how many waiting sequences are considered at a time.

    Returns:
        bin_of_sequence, int64 [N], and the number of bins; bins are numbered in the order in which they are filled.

    Raises:
        ValueError: a sequence is longer than the budget or negative, or an argument is out of range.
    """
    lengths = np.asarray(lengths)
    if lengths.size and not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(f"lengths must be integers, not {lengths.dtype}")
    lengths = np.ascontiguousarray(lengths, dtype=np.int64)
    if libraries.EXTENSION is not None:
        return libraries.EXTENSION.pack_sequences(lengths, budget, look_ahead)
    return pack_sequences_in_python(lengths, budget, look_ahead)


def pack_sequences_in_python(
    lengths: npt.NDArray[np.int64], budget: int, look_ahead: int
) -> tuple[npt.NDArray[np.int64], int]:
    """The definition of pack_sequences, used where the compiled module is missing."""
    if lengths.ndim != 1:
        raise ValueError(f"lengths must be one-dimensional, not {lengths.ndim}-d")
    if budget < 1:
        raise ValueError(f"budget must be at least 1 token, not {budget}")
    if look_ahead < 1:
        raise ValueError(f"look_ahead must be at least 1 sequence, not {look_ahead}")
    for i in np.flatnonzero((lengths < 0) | (lengths > budget))[:1]:
        if lengths[i] < 0:
            raise ValueError(f"sequence {i} has length {lengths[i]}")
        raise ValueError(
            f"sequence {i} has {lengths[i]} tokens, more than the budget of {budget}; "
            "raise the budget or shorten the sequence"
        )
    bin_of = np.empty(len(lengths), dtype=np.int64)
    waiting: list[int] = []
    following = iter(range(len(lengths)))
    bins, placed = 0, 0
    while placed < len(lengths):
        room, placed_any = budget, True
        while placed_any:
            waiting += [i for _, i in zip(range(look_ahead - len(waiting)), following, strict=False)]
            kept: list[int] = []
            for i in waiting:
                if lengths[i] <= room:
                    room -= int(lengths[i])
                    bin_of[i] = bins
                else:
                    kept.append(i)
            placed_any = len(kept) < len(waiting)
            placed += len(waiting) - len(kept)
            waiting = kept
        bins += 1
    return bin_of, bins
