"""Backward kernels of group_norm_silu: sums per channel, means per group, the gradient of x."""

from __future__ import annotations

import triton
import triton.language as tl

from dreamkernels.ops.group_norm_silu.triton_common import activation_gradient, address_of, channel_of, tile_of


@triton.jit
def backward_sum_kernel(
    grad_y,
    x,
    shift,
    weight,
    bias,
    mean,
    rstd,
    partial,
    channels,
    positions,
    groups,
    chunks,
    channel_blocks,
    per_chunk,
    SHIFT: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    # With n the normalised value and dz the gradient before the activation: sums of dz, dz n and n per channel.
    chunk, channel, sample = tile_of(tl.program_id(0), chunks, channel_blocks, CHANNELS)
    m, r, w, b = channel_of(sample, channel, mean, rstd, shift, weight, bias, channels, groups, SHIFT, WEIGHT, BIAS)
    begin = chunk * per_chunk
    end = tl.minimum(begin + per_chunk, positions)
    gradients = tl.zeros([CHANNELS], tl.float32)
    products = tl.zeros([CHANNELS], tl.float32)
    values = tl.zeros([CHANNELS], tl.float32)
    for start in range(begin, end, POSITIONS):
        at, inside = address_of(sample, channel, start + tl.arange(0, POSITIONS), channels, positions, end, LAST)
        n = (tl.load(x + at, inside, other=0.0).to(tl.float32) - m[:, None]) * r[:, None]
        n = tl.where(inside, n, 0.0)
        grad = tl.load(grad_y + at, inside, other=0.0).to(tl.float32)
        dz = activation_gradient(grad, n * w[:, None] + b[:, None], SILU)
        gradients += tl.sum(dz, axis=1)
        products += tl.sum(dz * n, axis=1)
        values += tl.sum(n, axis=1)
    to = partial + (sample * chunks + chunk) * 3 * channels + channel
    tl.store(to, gradients, channel < channels)
    tl.store(to + channels, products, channel < channels)
    tl.store(to + 2 * channels, values, channel < channels)


@triton.jit
def backward_statistics_kernel(
    partial,
    weight,
    rstd,
    means,
    affine_sums,
    grad_shift,
    channels,
    positions,
    groups,
    chunks,
    WEIGHT: tl.constexpr,
    AFFINE: tl.constexpr,
    SHIFT_GRAD: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One program per sample and group: means over the group of w dz and w dz n; sums over positions per channel."""
    program = tl.program_id(0)
    sample = (program // groups).to(tl.int64)
    width = channels // groups
    first = program % groups * width
    base = partial + sample * chunks * 3 * channels
    m1 = tl.zeros([CHANNELS], tl.float32)
    m2 = tl.zeros([CHANNELS], tl.float32)
    for start in range(0, width, CHANNELS):
        offset = start + tl.arange(0, CHANNELS)
        channel, inside = first + offset, offset < width
        gradients = tl.zeros([CHANNELS], tl.float32)
        products = tl.zeros([CHANNELS], tl.float32)
        for chunk in range(chunks):
            at = base + chunk * 3 * channels + channel
            gradients += tl.load(at, inside, other=0.0)
            products += tl.load(at + channels, inside, other=0.0)
        if AFFINE:
            tl.store(affine_sums + sample * 2 * channels + channel, products, inside)
            tl.store(affine_sums + sample * 2 * channels + channels + channel, gradients, inside)
        if WEIGHT:
            w = tl.load(weight + channel, inside, other=0.0).to(tl.float32)
            gradients *= w
            products *= w
        m1 += gradients
        m2 += products
    elements = (width * positions).to(tl.float32)
    mean_gradient = tl.sum(m1, axis=0) / elements
    mean_product = tl.sum(m2, axis=0) / elements
    tl.store(means + 2 * program, mean_gradient)
    tl.store(means + 2 * program + 1, mean_product)
    if SHIFT_GRAD:
        r = tl.load(rstd + program)
        for start in range(0, width, CHANNELS):
            offset = start + tl.arange(0, CHANNELS)
            channel, inside = first + offset, offset < width
            gradients = tl.zeros([CHANNELS], tl.float32)
            values = tl.zeros([CHANNELS], tl.float32)
            for chunk in range(chunks):
                at = base + chunk * 3 * channels + channel
                gradients += tl.load(at, inside, other=0.0)
                values += tl.load(at + 2 * channels, inside, other=0.0)
            if WEIGHT:
                gradients *= tl.load(weight + channel, inside, other=0.0).to(tl.float32)
            grad = r * (gradients - mean_product * values - mean_gradient * positions)
            tl.store(grad_shift + sample * channels + channel, grad.to(grad_shift.dtype.element_ty), inside)


@triton.jit
def backward_apply_kernel(
    grad_y,
    x,
    shift,
    weight,
    bias,
    mean,
    rstd,
    means,
    grad_x,
    channels,
    positions,
    groups,
    chunks,
    channel_blocks,
    SHIFT: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    chunk, channel, sample = tile_of(tl.program_id(0), chunks, channel_blocks, CHANNELS)
    m, r, w, b = channel_of(sample, channel, mean, rstd, shift, weight, bias, channels, groups, SHIFT, WEIGHT, BIAS)
    group = sample * groups + channel // (channels // groups)
    mean_gradient = tl.load(means + 2 * group, channel < channels, other=0.0)
    mean_product = tl.load(means + 2 * group + 1, channel < channels, other=0.0)
    position = chunk * POSITIONS + tl.arange(0, POSITIONS)
    at, inside = address_of(sample, channel, position, channels, positions, positions, LAST)
    n = (tl.load(x + at, inside, other=0.0).to(tl.float32) - m[:, None]) * r[:, None]
    grad = tl.load(grad_y + at, inside, other=0.0).to(tl.float32)
    dz = activation_gradient(grad, n * w[:, None] + b[:, None], SILU)
    out = (dz * w[:, None] - mean_gradient[:, None] - n * mean_product[:, None]) * r[:, None]
    tl.store(grad_x + at, out.to(grad_x.dtype.element_ty), inside)
