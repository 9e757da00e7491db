"""The backward kernels (Dao, FlashAttention-2, 2023, algorithm 2), without atomics: results repeat bit for bit.

    delta_kernel          delta = rowsum(out * grad_out) - grad_lse, one number per query and head
    keys_kernel           one program holds a tile of keys and walks over the queries that see them: grad_k, grad_v
    queries_kernel        one program holds a tile of queries and walks over the keys they see:     grad_q

Both recompute the weights as exp2(score - lse). A query outside its sequence, or one that sees no key, has its lse
replaced by +inf, so that its weights are zero without a mask.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dreamkernels.ops.attention.triton_common import (
    BAND,
    FULL,
    LOG2_E,
    capped,
    is_visible,
    key_blocks,
    load_tile,
    query_blocks,
    sequence_bounds,
)


@triton.jit
def delta_kernel(
    out,
    grad_out,
    grad_lse,
    lse,
    delta,
    shifted_lse,
    length,
    heads,
    tiles,
    LSE_GRAD: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Also writes the lse in units of log2, with +inf for queries that see nothing. [B, L, H, D] -> [B, H, L]."""
    program = tl.program_id(0)
    row = program % tiles * ROWS + tl.arange(0, ROWS)
    head = program // tiles % heads
    sequence = (program // tiles // heads).to(tl.int64)
    inside = row < length
    column = tl.arange(0, WIDTH)
    at = ((sequence * length + row)[:, None] * heads + head) * D + column[None, :]
    mask = inside[:, None] & (column < D)[None, :]
    out_tile = tl.load(out + at, mask, other=0.0).to(tl.float32)
    grad_tile = tl.load(grad_out + at, mask, other=0.0).to(tl.float32)
    target = (sequence * heads + head) * length + row
    log_sum = tl.load(lse + target, inside, other=0.0)
    sees_nothing = log_sum == float("-inf")
    value = tl.sum(out_tile * grad_tile, 1)
    if LSE_GRAD:
        value -= tl.load(grad_lse + target, inside, other=0.0)
    tl.store(delta + target, tl.where(sees_nothing, 0.0, value), inside)
    tl.store(shifted_lse + target, tl.where(sees_nothing, float("inf"), log_sum * LOG2_E), inside)


@triton.jit
def _visit_queries(
    grad_k,
    grad_v,
    grad_k_tail,
    grad_v_tail,
    k_tile,
    v_tile,
    k_tail,
    v_tail,
    q,
    grad_out,
    lse,
    delta,
    q_stride,
    grad_stride,
    begin,
    end,
    key,
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
    BLOCK_Q: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the queries [begin, end) of one head to the gradients of the keys and values."""
    column = tl.arange(0, HEAD)
    offset = tl.arange(0, BLOCK_Q)
    q_at = offset[:, None] * q_stride + column[None, :]
    grad_at = offset[:, None] * grad_stride + column[None, :]
    if TAIL:
        tail = HEAD + tl.arange(0, TAIL)
        q_tail_at = offset[:, None] * q_stride + tail[None, :]
        grad_tail_at = offset[:, None] * grad_stride + tail[None, :]
    for start in tl.range(begin, end, BLOCK_Q, num_stages=1 if MASKED else None):
        query = start + offset
        inside = query < len_q
        q_block = q + start * tl.cast(q_stride, tl.int64)
        grad_block = grad_out + start * tl.cast(grad_stride, tl.int64)
        q_tile = load_tile(q_block + q_at, inside[:, None], (column < D)[None, :], True, HEAD > D)
        grad_tile = load_tile(grad_block + grad_at, inside[:, None], (column < D)[None, :], True, HEAD > D)
        log_sum = tl.load(lse + query, inside, other=float("inf"))
        row_delta = tl.load(delta + query, inside, other=0.0)
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        grad_weights = tl.dot(v_tile, tl.trans(grad_tile), input_precision=PRECISION)
        if TAIL:
            q_tail = load_tile(q_block + q_tail_at, inside[:, None], (tail < D)[None, :], True, HEAD + TAIL > D)
            grad_tail = load_tile(
                grad_block + grad_tail_at, inside[:, None], (tail < D)[None, :], True, HEAD + TAIL > D
            )
            scores = tl.dot(k_tail, tl.trans(q_tail), scores, input_precision=PRECISION)
            grad_weights = tl.dot(v_tail, tl.trans(grad_tail), grad_weights, input_precision=PRECISION)
        scores, slope = capped(scores, scale, softcap, SOFTCAP, PRECISION)
        weights = tl.exp2(scores - log_sum[None, :])
        if MASKED:
            seen = is_visible(query[None, :], key[:, None], len_q, len_k, left, right, MASK)
            weights = tl.where(seen, weights, 0.0)
        grad_v = tl.dot(weights.to(grad_tile.dtype), grad_tile, grad_v, input_precision=PRECISION)
        grad_scores = weights * (grad_weights - row_delta[None, :])
        if SOFTCAP:
            grad_scores *= slope
        grad_scores = grad_scores.to(q_tile.dtype)
        grad_k = tl.dot(grad_scores, q_tile, grad_k, input_precision=PRECISION)
        if TAIL:
            grad_v_tail = tl.dot(weights.to(grad_tail.dtype), grad_tail, grad_v_tail, input_precision=PRECISION)
            grad_k_tail = tl.dot(grad_scores, q_tail, grad_k_tail, input_precision=PRECISION)
    return grad_k, grad_v, grad_k_tail, grad_v_tail


@triton.jit
def keys_kernel(
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    grad_k,
    grad_v,
    cu_seqlens_q,
    cu_seqlens_k,
    constant_kv_prefix,
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
    PREFIX: tl.constexpr,
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
    kv_heads = heads // group
    kv_head = program // tiles % kv_heads
    sequence = (program // tiles // kv_heads).to(tl.int64)
    begin_q, len_q = sequence_bounds(cu_seqlens_q, sequence, len_q, PACKED)
    begin_k, len_k = sequence_bounds(cu_seqlens_k, sequence, len_k, PACKED)
    first = tile * BLOCK_K
    if first >= len_k:
        return

    row = tl.arange(0, BLOCK_K)
    column = tl.arange(0, HEAD)
    key = first + row
    inside = key < len_k
    columns = (column < D)[None, :]
    k += sequence * k_sequence_stride + (begin_k + first) * k_stride + tl.cast(kv_head, tl.int64) * k_head_stride
    v += sequence * v_sequence_stride + (begin_k + first) * v_stride + tl.cast(kv_head, tl.int64) * v_head_stride
    k_tile = load_tile(k + row[:, None] * k_stride + column[None, :], inside[:, None], columns, True, HEAD > D)
    v_tile = load_tile(v + row[:, None] * v_stride + column[None, :], inside[:, None], columns, True, HEAD > D)
    sum_k = tl.zeros([BLOCK_K, HEAD], tl.float32)
    sum_v = tl.zeros([BLOCK_K, HEAD], tl.float32)
    k_tail, v_tail, sum_k_tail, sum_v_tail = 0.0, 0.0, 0.0, 0.0
    if TAIL:
        tail = HEAD + tl.arange(0, TAIL)
        tails = (tail < D)[None, :]
        k_tail = load_tile(k + row[:, None] * k_stride + tail[None, :], inside[:, None], tails, True, HEAD + TAIL > D)
        v_tail = load_tile(v + row[:, None] * v_stride + tail[None, :], inside[:, None], tails, True, HEAD + TAIL > D)
        sum_k_tail = tl.zeros([BLOCK_K, TAIL], tl.float32)
        sum_v_tail = tl.zeros([BLOCK_K, TAIL], tl.float32)

    begin, full_begin, full_end, end = query_blocks(first, BLOCK_K, len_q, len_k, left, right, BLOCK_Q, MASK)
    if PREFIX:
        prefix = tl.load(constant_kv_prefix + sequence)
        constant = first + BLOCK_K <= prefix  # all of these keys are: nothing to walk over
        begin = tl.where(constant, full_begin, begin)
        full_end = tl.where(constant, full_begin, full_end)
        end = tl.where(constant, full_begin, end)
    row_of_out = begin_q if PACKED else sequence * len_q
    for member in range(group):
        head = tl.cast(kv_head * group + member, tl.int64)
        q_head = q + sequence * q_sequence_stride + begin_q * q_stride + head * q_head_stride
        grad_head = grad_out + row_of_out * (heads * D) + head * D
        numbers = (head if PACKED else sequence * heads + head) * rows + begin_q
        if MASK != FULL:
            sum_k, sum_v, sum_k_tail, sum_v_tail = _visit_queries(
                sum_k, sum_v, sum_k_tail, sum_v_tail, k_tile, v_tile, k_tail, v_tail, q_head, grad_head,
                lse + numbers, delta + numbers, q_stride, heads * D, begin, tl.minimum(full_begin, end), key,
                len_q, len_k, scale, softcap, left, right,
                MASK, True, SOFTCAP, D, HEAD, TAIL, BLOCK_Q, PRECISION,
            )  # fmt: skip
        sum_k, sum_v, sum_k_tail, sum_v_tail = _visit_queries(
            sum_k, sum_v, sum_k_tail, sum_v_tail, k_tile, v_tile, k_tail, v_tail, q_head, grad_head,
            lse + numbers, delta + numbers, q_stride, heads * D, full_begin, full_end, key,
            len_q, len_k, scale, softcap, left, right,
            MASK, False, SOFTCAP, D, HEAD, TAIL, BLOCK_Q, PRECISION,
        )  # fmt: skip
        if MASK == BAND:
            sum_k, sum_v, sum_k_tail, sum_v_tail = _visit_queries(
                sum_k, sum_v, sum_k_tail, sum_v_tail, k_tile, v_tile, k_tail, v_tail, q_head, grad_head,
                lse + numbers, delta + numbers, q_stride, heads * D, full_end, end, key,
                len_q, len_k, scale, softcap, left, right,
                MASK, True, SOFTCAP, D, HEAD, TAIL, BLOCK_Q, PRECISION,
            )  # fmt: skip

    element = grad_k.dtype.element_ty
    row_of_grad = (begin_k if PACKED else sequence * len_k) + first
    at = row_of_grad * (kv_heads * D) + kv_head * D + row[:, None] * (kv_heads * D)
    sum_k *= scale
    if PREFIX:
        sum_k = tl.where((key < prefix)[:, None], 0.0, sum_k)
        sum_v = tl.where((key < prefix)[:, None], 0.0, sum_v)
    tl.store(grad_k + at + column[None, :], sum_k.to(element), inside[:, None] & columns)
    tl.store(grad_v + at + column[None, :], sum_v.to(element), inside[:, None] & columns)
    if TAIL:
        sum_k_tail *= scale
        if PREFIX:
            sum_k_tail = tl.where((key < prefix)[:, None], 0.0, sum_k_tail)
            sum_v_tail = tl.where((key < prefix)[:, None], 0.0, sum_v_tail)
        tl.store(grad_k + at + tail[None, :], sum_k_tail.to(element), inside[:, None] & tails)
        tl.store(grad_v + at + tail[None, :], sum_v_tail.to(element), inside[:, None] & tails)


@triton.jit
def _visit_keys(
    grad_q,
    grad_q_tail,
    q_tile,
    grad_tile,
    q_tail,
    grad_tail,
    log_sum,
    row_delta,
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
    """Adds the keys [begin, end) to the gradient of the queries."""
    column = tl.arange(0, HEAD)
    offset = tl.arange(0, BLOCK_K)
    k_at = offset[:, None] * k_stride + column[None, :]
    v_at = offset[:, None] * v_stride + column[None, :]
    if TAIL:
        tail = HEAD + tl.arange(0, TAIL)
        k_tail_at = offset[:, None] * k_stride + tail[None, :]
        v_tail_at = offset[:, None] * v_stride + tail[None, :]
    for start in tl.range(begin, end, BLOCK_K, num_stages=1 if MASKED else None):
        key = start + offset
        inside = (key < len_k)[:, None]
        k_block = k + start * tl.cast(k_stride, tl.int64)
        v_block = v + start * tl.cast(v_stride, tl.int64)
        k_tile = load_tile(k_block + k_at, inside, (column < D)[None, :], MASKED, HEAD > D)
        v_tile = load_tile(v_block + v_at, inside, (column < D)[None, :], MASKED, HEAD > D)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        grad_weights = tl.dot(grad_tile, tl.trans(v_tile), input_precision=PRECISION)
        if TAIL:
            k_tail = load_tile(k_block + k_tail_at, inside, (tail < D)[None, :], MASKED, HEAD + TAIL > D)
            v_tail = load_tile(v_block + v_tail_at, inside, (tail < D)[None, :], MASKED, HEAD + TAIL > D)
            scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision=PRECISION)
            grad_weights = tl.dot(grad_tail, tl.trans(v_tail), grad_weights, input_precision=PRECISION)
        scores, slope = capped(scores, scale, softcap, SOFTCAP, PRECISION)
        weights = tl.exp2(scores - log_sum[:, None])
        if MASKED:
            seen = is_visible(query[:, None], key[None, :], len_q, len_k, left, right, MASK)
            weights = tl.where(seen, weights, 0.0)
        grad_scores = weights * (grad_weights - row_delta[:, None])
        if SOFTCAP:
            grad_scores *= slope
        grad_scores = grad_scores.to(k_tile.dtype)
        grad_q = tl.dot(grad_scores, k_tile, grad_q, input_precision=PRECISION)
        if TAIL:
            grad_q_tail = tl.dot(grad_scores, k_tail, grad_q_tail, input_precision=PRECISION)
    return grad_q, grad_q_tail


@triton.jit
def queries_kernel(
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    grad_q,
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
    columns = (column < D)[None, :]
    q += sequence * q_sequence_stride + (begin_q + first) * q_stride + tl.cast(head, tl.int64) * q_head_stride
    k += sequence * k_sequence_stride + begin_k * k_stride + tl.cast(head // group, tl.int64) * k_head_stride
    v += sequence * v_sequence_stride + begin_k * v_stride + tl.cast(head // group, tl.int64) * v_head_stride
    row_of_grad = (begin_q if PACKED else sequence * len_q) + first
    grad_at = row_of_grad * (heads * D) + head * D + row[:, None] * (heads * D)
    numbers = (tl.cast(head, tl.int64) if PACKED else sequence * heads + head) * rows + begin_q + query
    log_sum = tl.load(lse + numbers, inside, other=float("inf"))
    row_delta = tl.load(delta + numbers, inside, other=0.0)
    q_tile = load_tile(q + row[:, None] * q_stride + column[None, :], inside[:, None], columns, True, HEAD > D)
    grad_tile = load_tile(grad_out + grad_at + column[None, :], inside[:, None], columns, True, HEAD > D)
    total = tl.zeros([BLOCK_Q, HEAD], tl.float32)
    q_tail, grad_tail, total_tail = 0.0, 0.0, 0.0
    if TAIL:
        tail = HEAD + tl.arange(0, TAIL)
        tails = (tail < D)[None, :]
        q_tail = load_tile(q + row[:, None] * q_stride + tail[None, :], inside[:, None], tails, True, HEAD + TAIL > D)
        grad_tail = load_tile(grad_out + grad_at + tail[None, :], inside[:, None], tails, True, HEAD + TAIL > D)
        total_tail = tl.zeros([BLOCK_Q, TAIL], tl.float32)

    begin, full_begin, full_end, end = key_blocks(first, BLOCK_Q, len_q, len_k, left, right, BLOCK_K, MASK)
    if MASK == BAND:
        total, total_tail = _visit_keys(
            total, total_tail, q_tile, grad_tile, q_tail, grad_tail, log_sum, row_delta, k, v, k_stride, v_stride,
            begin, tl.minimum(full_begin, end), query, len_q, len_k, scale, softcap, left, right,
            MASK, True, SOFTCAP, D, HEAD, TAIL, BLOCK_K, PRECISION,
        )  # fmt: skip
    total, total_tail = _visit_keys(
        total, total_tail, q_tile, grad_tile, q_tail, grad_tail, log_sum, row_delta, k, v, k_stride, v_stride,
        full_begin, full_end, query, len_q, len_k, scale, softcap, left, right,
        MASK, False, SOFTCAP, D, HEAD, TAIL, BLOCK_K, PRECISION,
    )  # fmt: skip
    total, total_tail = _visit_keys(
        total, total_tail, q_tile, grad_tile, q_tail, grad_tail, log_sum, row_delta, k, v, k_stride, v_stride,
        full_end, end, query, len_q, len_k, scale, softcap, left, right,
        MASK, True, SOFTCAP, D, HEAD, TAIL, BLOCK_K, PRECISION,
    )  # fmt: skip

    element = grad_q.dtype.element_ty
    tl.store(grad_q + grad_at + column[None, :], (total * scale).to(element), inside[:, None] & columns)
    if TAIL:
        tl.store(grad_q + grad_at + tail[None, :], (total_tail * scale).to(element), inside[:, None] & tails)


# A tail is the float 0.0 until TAIL makes it a tensor.
# mypy: disable-error-code="attr-defined"
