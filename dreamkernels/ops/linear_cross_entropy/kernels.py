"""GPU kernels of linear_cross_entropy.

The rows that have a target are numbered on the device (`order`), the others follow; how many there are (`count`) never
reaches the host. The grid covers all rows, and a program whose rows lie beyond the count returns at once: ignored rows
cost a launch slot, neither products nor memory traffic. This is why the products are Triton's and not cuBLAS's, which
needs their sizes on the host and would multiply every row.

The rows are walked over in chunks of `rows`; per chunk:

    gather_kernel       rows of hidden, by `order`  ->  states [rows, H]; a product that gathered for itself would wait
                        for the numbers of its rows, and could not load ahead
    logits_kernel       [rows, H] x [H, V]  ->  logits of the chunk, in the dtype of hidden
    loss_kernel         one program per row: logsumexp, loss, and the gradient of the logits in place
    hidden_grad_kernel  [rows, V] x [V, H]  ->  rows of grad_hidden, scattered by `order`
    weight_grad_kernel  [V, rows] x [rows, H]  ->  float32 sums over the chunks; the last one rounds them

A row of logits is padded to a multiple of ROW_PADDING, so that rows begin at 16-byte boundaries and the products need
no mask along it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(program, row_blocks, column_blocks, GROUP: tl.constexpr):
    """Programs that run at one time share GROUP row blocks and a few column blocks, which stay in the cache."""
    per_group = GROUP * column_blocks
    first = program // per_group * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    return first + program % per_group % size, program % per_group // size


@triton.jit
def gather_kernel(hidden, order, count, states, start, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if start + row >= tl.load(count):
        return
    source = hidden + tl.load(order + start + row) * width
    column = tl.arange(0, BLOCK)
    for first in range(0, width, BLOCK):
        inside = column < width - first
        tl.store(states + row * width + first + column, tl.load(source + first + column, inside), inside)


@triton.jit
def logits_kernel(
    states,
    weight,
    count,
    logits,
    start,
    rows,
    vocabulary,
    padded,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    m, n = tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(padded, BLOCK_N), GROUP)
    remaining = tl.minimum(tl.load(count) - start, rows).to(tl.int32)
    if m * BLOCK_M >= remaining:
        return
    row = m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = n * BLOCK_N + tl.arange(0, BLOCK_N)
    # The padding repeats the first entry; nobody reads it.
    entry = tl.where(column < vocabulary, column, 0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    a = states + tl.where(row < remaining, row, 0).to(tl.int64)[:, None] * width + k[None, :]
    b = weight + entry[None, :] * width + k[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, width, BLOCK_K):
        inside = k < width - first
        total = tl.dot(
            tl.load(a, inside[None, :], other=0.0),
            tl.load(b, inside[:, None], other=0.0),
            total,
            input_precision="ieee",
        )
        a += BLOCK_K
        b += BLOCK_K
    at = row.to(tl.int64)[:, None] * padded + column[None, :]
    tl.store(logits + at, total.to(logits.dtype.element_ty), (row < remaining)[:, None] & (column < padded)[None, :])


@triton.jit
def tanh(v):
    square = v * v
    far = 1.0 - 2.0 / (tl.exp(2.0 * v) + 1.0)
    q = ((0.006205946672707796 * square - 0.02102552354335785) * square + 0.05384168401360512) * square
    q = (q - 0.13332490622997284) * square + 0.33333316445350647
    return tl.where(square < 0.3125, v - v * square * q, far)  # far would cancel near zero


@triton.jit
def loss_kernel(
    logits,
    targets,
    order,
    count,
    grad_loss,
    losses,
    start,
    vocabulary,
    padded,
    softcap,
    z_loss,
    GRADIENT: tl.constexpr,
    LOSS: tl.constexpr,
    CAP: tl.constexpr,
    MEAN: tl.constexpr,
    PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    valid = tl.load(count)
    if start + row >= valid:
        return
    token = tl.load(order + start + row)
    target = tl.load(targets + token).to(tl.int64)
    here = logits + row * padded
    has_target = (target >= 0) & (target < vocabulary)
    # Read before the first reduction, whose barrier keeps the gradient from overwriting it.
    target_logit = tl.load(here + tl.where(has_target, target, 0)).to(tl.float32)
    if CAP:
        target_logit = softcap * tanh(target_logit / softcap)
    column = tl.arange(0, BLOCK)
    largest = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    for first in range(0, padded, BLOCK):
        v = tl.load(here + first + column, first + column < padded, other=0.0).to(tl.float32)
        if CAP:
            v = softcap * tanh(v / softcap)
        v = tl.where(first + column < vocabulary, v, float("-inf"))
        larger = tl.maximum(largest, tl.max(v, axis=0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(v - larger), axis=0)
        largest = larger
    lse = largest + tl.log(total)
    if LOSS:
        tl.store(losses + token, lse - tl.where(has_target, target_logit, 0.0) + z_loss * lse * lse)
    if GRADIENT:
        factor = tl.load(grad_loss + token) if PER_ROW else tl.load(grad_loss)
        if MEAN:
            factor = factor / valid.to(tl.float32)
        of_z_loss = factor * 2.0 * z_loss * lse
        for first in range(0, padded, BLOCK):
            v = tl.load(here + first + column, first + column < padded, other=0.0).to(tl.float32)
            slope = 1.0
            if CAP:
                t = tanh(v / softcap)
                slope = 1.0 - t * t
                v = softcap * t
            softmax = tl.exp(v - lse)
            gradient = (softmax - tl.where(first + column == target, 1.0, 0.0)) * factor + softmax * of_z_loss
            gradient = tl.where(first + column < vocabulary, gradient * slope, 0.0)
            tl.store(here + first + column, gradient.to(logits.dtype.element_ty), first + column < padded)


@triton.jit
def hidden_grad_kernel(
    gradient,
    weight,
    order,
    count,
    grad_hidden,
    start,
    rows,
    vocabulary,
    padded,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    m, n = tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(width, BLOCK_N), GROUP)
    remaining = tl.minimum(tl.load(count) - start, rows).to(tl.int32)
    if m * BLOCK_M >= remaining:
        return
    row = m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a = gradient + tl.where(row < remaining, row, 0).to(tl.int64)[:, None] * padded + k[None, :]
    b = weight + k.to(tl.int64)[:, None] * width + column[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, padded, BLOCK_K):  # the gradient is zero in the padding
        inside = (k < vocabulary - first)[:, None] & (column < width)[None, :]
        total = tl.dot(tl.load(a), tl.load(b, inside, other=0.0), total, input_precision="ieee")
        a += BLOCK_K
        b += BLOCK_K * width
    token = tl.load(order + start + row, row < remaining, other=0)
    at = token[:, None] * width + column[None, :]
    tl.store(
        grad_hidden + at, total.to(grad_hidden.dtype.element_ty), (row < remaining)[:, None] & (column < width)[None, :]
    )


@triton.jit
def weight_grad_kernel(
    gradient,
    states,
    count,
    sums,
    grad_weight,
    start,
    rows,
    vocabulary,
    padded,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    valid = tl.load(count)
    if (start > 0) & (start >= valid):
        return
    m, n = tile_of(tl.program_id(0), tl.cdiv(vocabulary, BLOCK_M), tl.cdiv(width, BLOCK_N), GROUP)
    remaining = tl.minimum(valid - start, rows).to(tl.int32)
    entry = m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a = gradient + k.to(tl.int64)[None, :] * padded + entry[:, None]
    b = states + k.to(tl.int64)[:, None] * width + column[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, remaining, BLOCK_K):
        inside = k < remaining - first
        total = tl.dot(
            tl.load(a, inside[None, :] & (entry < padded)[:, None], other=0.0),
            tl.load(b, inside[:, None] & (column < width)[None, :], other=0.0),
            total,
            input_precision="ieee",
        )
        a += BLOCK_K * padded
        b += BLOCK_K * width
    at = entry.to(tl.int64)[:, None] * width + column[None, :]
    inside = (entry < vocabulary)[:, None] & (column < width)[None, :]
    if start > 0:
        total += tl.load(sums + at, inside, other=0.0)
    if start + rows >= valid:
        tl.store(grad_weight + at, total.to(grad_weight.dtype.element_ty), inside)
    else:
        tl.store(sums + at, total, inside)


@triton.jit
def scale_kernel(x, factor, count, BLOCK: tl.constexpr):
    by = tl.load(factor)
    if by == 1.0:
        return
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scaled = tl.load(x + at, at < count, other=0.0).to(tl.float32) * by
    tl.store(x + at, scaled.to(x.dtype.element_ty), at < count)
