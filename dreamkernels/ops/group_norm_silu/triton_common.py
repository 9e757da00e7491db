"""What the group_norm_silu kernels of both directions share: where a tile lies, how its channels are normalised."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activation_gradient(grad, z, SILU: tl.constexpr):
    if SILU:
        s = tl.sigmoid(z)
        grad = grad * (s + z * s * (1.0 - s))
    return grad


@triton.jit
def tile_of(program, chunks, channel_blocks, CHANNELS: tl.constexpr):
    """-> chunk, channels [CHANNELS], sample of a program."""
    chunk = program % chunks
    block = program // chunks % channel_blocks
    return chunk, block * CHANNELS + tl.arange(0, CHANNELS), (program // chunks // channel_blocks).to(tl.int64)


@triton.jit
def address_of(sample, channel, position, channels, positions, end, LAST: tl.constexpr):
    """Offsets [CHANNELS, POSITIONS] of a tile, and which of them are inside: positions before `end`."""
    inside = (channel < channels)[:, None] & (position < end)[None, :]
    if LAST:
        at = (sample * positions + position)[None, :] * channels + channel[:, None]
    else:
        at = (sample * channels + channel)[:, None] * positions + position[None, :]
    return at, inside


@triton.jit
def channel_of(
    sample,
    channel,
    mean,
    rstd,
    shift,
    weight,
    bias,
    channels,
    groups,
    SHIFT: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
):
    """-> mean - shift, rstd, weight, bias of each channel."""
    inside = channel < channels
    group = sample * groups + channel // (channels // groups)
    m = tl.load(mean + group, inside, other=0.0)
    r = tl.load(rstd + group, inside, other=0.0)
    if SHIFT:
        m -= tl.load(shift + sample * channels + channel, inside, other=0.0).to(tl.float32)
    w = r * 0.0 + 1.0
    if WEIGHT:
        w = tl.load(weight + channel, inside, other=0.0).to(tl.float32)
    b = r * 0.0
    if BIAS:
        b = tl.load(bias + channel, inside, other=0.0).to(tl.float32)
    return m, r, w, b
