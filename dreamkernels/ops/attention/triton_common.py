"""What the attention kernels share: where a sequence lies, which blocks a tile visits, scores and their mask.

Heads are processed in one part or two of a power of two, D <= HEAD + TAIL (TAIL may be 0): a width such as 80 takes
64 + 16 columns where registers allow, else 128 of which the last are empty.

MASK is one of FULL (every key), CAUSAL (keys up to the aligned one) and BAND (between `left` before and `right` after
the aligned one). Scores are kept in units of log2, since the hardware's exponential is exp2.
"""

from __future__ import annotations

import triton
import triton.language as tl

FULL = tl.constexpr(0)
CAUSAL = tl.constexpr(1)
BAND = tl.constexpr(2)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def sequence_bounds(cu_seqlens, index, length, PACKED: tl.constexpr):
    """First token and number of tokens of a sequence; the first is 64 bits wide, for what is computed from it."""
    if PACKED:
        begin = tl.load(cu_seqlens + index)
        return begin.to(tl.int64), tl.load(cu_seqlens + index + 1) - begin
    else:
        return tl.cast(0, tl.int64), length


@triton.jit
def load_tile(pointers, row_inside, column_inside, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    if MASK_ROWS:
        if MASK_COLUMNS:
            return tl.load(pointers, row_inside & column_inside, other=0.0)
        else:
            return tl.load(pointers, row_inside, other=0.0)
    else:
        if MASK_COLUMNS:
            return tl.load(pointers, column_inside, other=0.0)
        else:
            return tl.load(pointers)


@triton.jit
def key_blocks(first, rows, len_q, len_k, left, right, BLOCK_K: tl.constexpr, MASK: tl.constexpr):
    """Which keys the queries [first, first + rows) need: four multiples of BLOCK_K a <= b <= c and an end.

    Blocks in [a, b) and [c, end) hold keys that some of these queries do not see, blocks in [b, c) none.
    """
    at = first + len_k - len_q  # where the first query stands among the keys
    last = tl.minimum(rows, len_q - first) - 1 + at
    begin, full_begin, full_end, end = 0, 0, len_k, len_k
    if MASK != FULL:
        full_end = tl.minimum(len_k, at + right + 1)
        end = tl.maximum(0, tl.minimum(len_k, last + right + 1))
    if MASK == BAND:
        begin = tl.maximum(0, at - left) // BLOCK_K * BLOCK_K
        full_begin = tl.maximum(begin, (tl.maximum(0, last - left) + BLOCK_K - 1) // BLOCK_K * BLOCK_K)
    full_end = tl.maximum(full_begin, tl.maximum(0, full_end) // BLOCK_K * BLOCK_K)
    return begin, full_begin, full_end, end


@triton.jit
def query_blocks(first, keys, len_q, len_k, left, right, BLOCK_Q: tl.constexpr, MASK: tl.constexpr):
    """As `key_blocks`, with the roles exchanged: which queries see the keys [first, first + keys).

    Queries beyond the last one need no mask, so they count as seeing every key; c < end only for BAND.
    """
    at = first - (len_k - len_q)  # the query that stands at the first key
    last = tl.minimum(keys, len_k - first) - 1 + at
    begin, full_begin, full_end, end = 0, 0, len_q, len_q
    if MASK != FULL:
        begin = tl.maximum(0, at - right) // BLOCK_Q * BLOCK_Q
        full_begin = tl.maximum(begin, (tl.maximum(0, last - right) + BLOCK_Q - 1) // BLOCK_Q * BLOCK_Q)
    if MASK == BAND:
        full_end = tl.minimum(len_q, at + left + 1)
        end = tl.maximum(0, tl.minimum(len_q, last + left + 1))
        full_end = tl.maximum(full_begin, tl.maximum(0, full_end) // BLOCK_Q * BLOCK_Q)
    return begin, full_begin, full_end, end


@triton.jit
def is_visible(query, key, len_q, len_k, left, right, MASK: tl.constexpr):
    visible = key < len_k
    if MASK != FULL:
        visible = visible & (key <= query + (len_k - len_q + right))
    if MASK == BAND:
        visible = visible & (key >= query + (len_k - len_q - left))
    return visible


@triton.jit
def tanh(x, ACCURATE: tl.constexpr):
    """Absolute error below 1e-7; ACCURATE: relative, with a series where 1 - exp cancels. libdevice would end the
    interpreter's use of these kernels."""
    decay = tl.exp2(-2.8853900818 * tl.abs(x))
    magnitude = (1.0 - decay) / (1.0 + decay)
    value = tl.where(x < 0, -magnitude, magnitude)
    if ACCURATE:
        square = x * x
        series = -0.0014558344 + square * 0.0005900274
        series = 0.0035921280 + square * series
        series = -0.0088632355 + square * series
        series = 0.0218694885 + square * series
        series = -0.0539682540 + square * series
        series = 0.1333333333 + square * series
        series = -0.3333333333 + square * series
        value = tl.where(square < 0.3, x + x * square * series, value)
    return value


@triton.jit
def capped(scores, scale, softcap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Products q k -> scores in units of log2, and the derivative of a score by its scaled product."""
    if SOFTCAP:
        bent = tanh(scores * (scale / softcap), PRECISION == "ieee")
        return bent * (softcap * LOG2_E), 1.0 - bent * bent
    else:
        return scores * (scale * LOG2_E), 1.0
