"""Forward kernels of group_norm_silu: sums per channel, statistics per group, the result; or all in one."""

from __future__ import annotations

import triton
import triton.language as tl

from dreamkernels.ops.group_norm_silu.triton_common import address_of, channel_of, tile_of


@triton.jit
def group_kernel(
    x,
    shift,
    weight,
    bias,
    y,
    mean_out,
    rstd_out,
    channels,
    positions,
    groups,
    eps,
    SHIFT: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    width = channels // groups
    sample = (program // groups).to(tl.int64)
    first = program % groups * width
    element = tl.arange(0, BLOCK)
    inside = element < width * positions
    channel = first + element // positions
    at = (sample * channels + first) * positions + element
    v = tl.load(x + at, inside, other=0.0).to(tl.float32)
    if SHIFT:
        v += tl.load(shift + sample * channels + channel, inside, other=0.0).to(tl.float32)
    mean = tl.sum(v, axis=0) / (width * positions)
    d = tl.where(inside, v - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(d * d, axis=0) / (width * positions) + eps)
    z = d * rstd
    if WEIGHT:
        z *= tl.load(weight + channel, inside, other=0.0).to(tl.float32)
    if BIAS:
        z += tl.load(bias + channel, inside, other=0.0).to(tl.float32)
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(y + at, z.to(y.dtype.element_ty), inside)
    tl.store(mean_out + program, mean)
    tl.store(rstd_out + program, rstd)


@triton.jit
def sum_kernel(
    x,
    partial,
    channels,
    positions,
    chunks,
    channel_blocks,
    per_chunk,
    LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    # Differences to a pivot (each channel's mean over the first tile), whose subtraction cancels little.
    chunk, channel, sample = tile_of(tl.program_id(0), chunks, channel_blocks, CHANNELS)
    begin = chunk * per_chunk
    end = tl.minimum(begin + per_chunk, positions)
    at, inside = address_of(sample, channel, begin + tl.arange(0, POSITIONS), channels, positions, end, LAST)
    pivot = tl.sum(tl.load(x + at, inside, other=0.0).to(tl.float32), axis=1) / tl.minimum(end - begin, POSITIONS)
    total = tl.zeros([CHANNELS], tl.float32)
    squares = tl.zeros([CHANNELS], tl.float32)
    for start in range(begin, end, POSITIONS):
        at, inside = address_of(sample, channel, start + tl.arange(0, POSITIONS), channels, positions, end, LAST)
        d = tl.where(inside, tl.load(x + at, inside, other=0.0).to(tl.float32) - pivot[:, None], 0.0)
        total += tl.sum(d, axis=1)
        squares += tl.sum(d * d, axis=1)
    to = partial + (sample * chunks + chunk) * 3 * channels + channel
    tl.store(to, pivot, channel < channels)
    tl.store(to + channels, total, channel < channels)
    tl.store(to + 2 * channels, squares, channel < channels)


@triton.jit
def statistics_kernel(
    partial,
    shift,
    mean_out,
    rstd_out,
    channels,
    positions,
    groups,
    chunks,
    per_chunk,
    eps,
    SHIFT: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One program per sample and group; CHANNELS channels of it at a time."""
    program = tl.program_id(0)
    sample = (program // groups).to(tl.int64)
    width = channels // groups
    first = program % groups * width
    base = partial + sample * chunks * 3 * channels
    origin = tl.load(base + first)  # near the mean, so that the sum of what is left is small
    if SHIFT:
        origin += tl.load(shift + sample * channels + first).to(tl.float32)
    total = tl.zeros([CHANNELS], tl.float32)
    for start in range(0, width, CHANNELS):
        offset = start + tl.arange(0, CHANNELS)
        channel, inside = first + offset, offset < width
        added = tl.zeros([CHANNELS], tl.float32)
        if SHIFT:
            added = tl.load(shift + sample * channels + channel, inside, other=0.0).to(tl.float32)
        for chunk in range(chunks):
            count = tl.minimum(per_chunk, positions - chunk * per_chunk).to(tl.float32)
            at = base + chunk * 3 * channels + channel
            pivot = tl.load(at, inside, other=0.0) + added - origin
            total += tl.where(inside, pivot * count, 0.0) + tl.load(at + channels, inside, other=0.0)
    elements = (width * positions).to(tl.float32)
    mean = origin + tl.sum(total, axis=0) / elements
    squares = tl.zeros([CHANNELS], tl.float32)
    for start in range(0, width, CHANNELS):
        offset = start + tl.arange(0, CHANNELS)
        channel, inside = first + offset, offset < width
        added = tl.zeros([CHANNELS], tl.float32)
        if SHIFT:
            added = tl.load(shift + sample * channels + channel, inside, other=0.0).to(tl.float32)
        for chunk in range(chunks):
            count = tl.minimum(per_chunk, positions - chunk * per_chunk).to(tl.float32)
            at = base + chunk * 3 * channels + channel
            difference = tl.load(at + channels, inside, other=0.0) / count
            distance = tl.where(inside, tl.load(at, inside, other=0.0) + added - mean + difference, 0.0)
            own = tl.load(at + 2 * channels, inside, other=0.0) - difference * difference * count
            squares += own + distance * distance * count
    tl.store(mean_out + program, mean)
    tl.store(rstd_out + program, tl.rsqrt(tl.sum(squares, axis=0) / elements + eps))


@triton.jit
def apply_kernel(
    x,
    shift,
    weight,
    bias,
    mean,
    rstd,
    y,
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
    position = chunk * POSITIONS + tl.arange(0, POSITIONS)
    at, inside = address_of(sample, channel, position, channels, positions, positions, LAST)
    d = tl.load(x + at, inside, other=0.0).to(tl.float32) - m[:, None]
    z = d * (r * w)[:, None] + b[:, None]
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(y + at, z.to(y.dtype.element_ty), inside)
