"""The forward kernel: one program holds a tile of queries of one head and walks over the keys they see.

    queries [BLOCK_Q, D]  x  keys [BLOCK_K, D], a block at a time:  running maximum, sum and output in registers

Blocks that are seen by every query of the tile, by far most of them, are computed without a mask.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dreamkernels.ops.attention.triton_common import (
    BAND,
    FULL,
    LN_2,
    LOG2_E,
    capped,
    is_visible,
    key_blocks,
    load_tile,
    sequence_bounds,
)


@triton.jit
def _visit_keys(
    out,
    out_tail,
    maximum,
    total,
    q,
    q_tail,
    k,
    v,
    k_stride,
    v_stride,
    begin,
    end,
    query,
    len_q,
    len_k,
    scale,
    softcap,
    left,
    right,
    MASK: tl.constexpr,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the keys [begin, end) to the running maximum, sum and output."""
    column = tl.arange(0, HEAD)
    offset = tl.arange(0, BLOCK_K)
    k_at = column[:, None] + offset[None, :] * k_stride
    v_at = offset[:, None] * v_stride + column[None, :]
    if TAIL:
        tail = HEAD + tl.arange(0, TAIL)
        k_tail_at = tail[:, None] + offset[None, :] * k_stride
        v_tail_at = offset[:, None] * v_stride + tail[None, :]
    for start in range(begin, end, BLOCK_K):
        key = start + offset
        inside = key < len_k
        k_block = k + start * tl.cast(k_stride, tl.int64)
        v_block = v + start * tl.cast(v_stride, tl.int64)
        k_tile = load_tile(k_block + k_at, inside[None, :], (column < D)[:, None], MASKED, HEAD > D)
        scores = tl.dot(q, k_tile, input_precision=PRECISION)
        if TAIL:
            k_tile = load_tile(k_block + k_tail_at, inside[None, :], (tail < D)[:, None], MASKED, HEAD + TAIL > D)
            scores = tl.dot(q_tail, k_tile, scores, input_precision=PRECISION)
        # Without a cap the scaling is left to the multiply-add inside the exponential.
        factor = scale * LOG2_E
        if SOFTCAP:
            scores = capped(scores, scale, softcap, SOFTCAP, PRECISION)[0]
            factor = 1.0
        if MASKED:
            seen = is_visible(query[:, None], key[None, :], len_q, len_k, left, right, MASK)
            scores = tl.where(seen, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1) * factor)
        shift = new_maximum
        if MASKED:  # rows that have seen nothing yet
            shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(scores * factor - shift[:, None])
        decay = tl.exp2(maximum - shift)
        total = total * decay + tl.sum(weights, 1)
        maximum = new_maximum
        out = out * decay[:, None]
        v_tile = load_tile(v_block + v_at, inside[:, None], (column < D)[None, :], MASKED, HEAD > D)
        weights = weights.to(v_tile.dtype)
        out = tl.dot(weights, v_tile, out, input_precision=PRECISION)
        if TAIL:
            v_tile = load_tile(v_block + v_tail_at, inside[:, None], (tail < D)[None, :], MASKED, HEAD + TAIL > D)
            out_tail = tl.dot(weights, v_tile, out_tail * decay[:, None], input_precision=PRECISION)
    return out, out_tail, maximum, total


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    cu_seqlens_q,
    cu_seqlens_k,
    q_sequence_stride,
    q_stride,
    q_head_stride,
    k_sequence_stride,
    k_stride,
    k_head_stride,
    v_sequence_stride,
    v_stride,
    v_head_stride,
    len_q,
    len_k,
    rows,
    heads,
    group,
    tiles,
    scale,
    softcap,
    left,
    right,
    MASK: tl.constexpr,
    PACKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    tile = program % tiles
    head = program // tiles % heads
    sequence = (program // tiles // heads).to(tl.int64)
    if MASK != FULL:
        tile = tiles - 1 - tile  # the tiles with most keys start first
    begin_q, len_q = sequence_bounds(cu_seqlens_q, sequence, len_q, PACKED)
    begin_k, len_k = sequence_bounds(cu_seqlens_k, sequence, len_k, PACKED)
    first = tile * BLOCK_Q
    if first >= len_q:
        return

    row = tl.arange(0, BLOCK_Q)
    column = tl.arange(0, HEAD)
    query = first + row
    inside = query < len_q
    q += sequence * q_sequence_stride + (begin_q + first) * q_stride + tl.cast(head, tl.int64) * q_head_stride
    k += sequence * k_sequence_stride + begin_k * k_stride + tl.cast(head // group, tl.int64) * k_head_stride
    v += sequence * v_sequence_stride + begin_k * v_stride + tl.cast(head // group, tl.int64) * v_head_stride
    q_rows = row[:, None] * q_stride
    q_tile = load_tile(q + q_rows + column[None, :], inside[:, None], (column < D)[None, :], True, HEAD > D)
    q_tail, out_tail = 0.0, 0.0
    if TAIL:
        tail = HEAD + tl.arange(0, TAIL)
        q_tail = load_tile(q + q_rows + tail[None, :], inside[:, None], (tail < D)[None, :], True, HEAD + TAIL > D)
        out_tail = tl.zeros([BLOCK_Q, TAIL], tl.float32)
    total_out = tl.zeros([BLOCK_Q, HEAD], tl.float32)
    maximum = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)

    begin, full_begin, full_end, end = key_blocks(first, BLOCK_Q, len_q, len_k, left, right, BLOCK_K, MASK)
    if MASK == BAND:
        total_out, out_tail, maximum, total = _visit_keys(
            total_out, out_tail, maximum, total, q_tile, q_tail, k, v, k_stride, v_stride, begin,
            tl.minimum(full_begin, end), query, len_q, len_k, scale, softcap, left, right,
            MASK, True, SOFTCAP, D, HEAD, TAIL, BLOCK_K, PRECISION,
        )  # fmt: skip
    total_out, out_tail, maximum, total = _visit_keys(
        total_out, out_tail, maximum, total, q_tile, q_tail, k, v, k_stride, v_stride, full_begin,
        full_end, query, len_q, len_k, scale, softcap, left, right,
        MASK, False, SOFTCAP, D, HEAD, TAIL, BLOCK_K, PRECISION,
    )  # fmt: skip
    total_out, out_tail, maximum, total = _visit_keys(
        total_out, out_tail, maximum, total, q_tile, q_tail, k, v, k_stride, v_stride, full_end,
        end, query, len_q, len_k, scale, softcap, left, right,
        MASK, True, SOFTCAP, D, HEAD, TAIL, BLOCK_K, PRECISION,
    )  # fmt: skip

    saw_nothing = total == 0
    total = tl.where(saw_nothing, 1.0, total)
    inverse = 1.0 / total
    row_of_out = (sequence * len_q + begin_q) if not PACKED else begin_q
    out += (row_of_out + first) * (heads * D) + head * D
    out_rows = row[:, None] * (heads * D)
    out_mask = inside[:, None] & (column < D)[None, :]
    tl.store(out + out_rows + column[None, :], (total_out * inverse[:, None]).to(out.dtype.element_ty), out_mask)
    if TAIL:
        tail_mask = inside[:, None] & (tail < D)[None, :]
        tl.store(out + out_rows + tail[None, :], (out_tail * inverse[:, None]).to(out.dtype.element_ty), tail_mask)
    row_of_lse = tl.cast(head, tl.int64) if PACKED else sequence * heads + head
    lse_tile = tl.where(saw_nothing, float("-inf"), (maximum + tl.log2(total)) * LN_2)
    tl.store(lse + row_of_lse * rows + begin_q + first + row, lse_tile, inside)
