"""The memory layout of what rotary returns."""

from __future__ import annotations

import torch


def empty_in_memory_order_of(x: torch.Tensor) -> torch.Tensor:
    """An empty tensor of the shape of x: dense, channels innermost, the other dimensions in the order they have in x.

    A dense x with adjacent channels gives exactly its strides. csrc/rotary/cpu.cpp does the same.
    """
    shape, x_strides = list(x.shape), x.stride()
    leading = range(x.dim() - 1)
    if x_strides[-1] == 1:
        order = sorted(leading, key=lambda d: -x_strides[d])  # stable: equal strides stay in order
    else:  # it is copied to a row-major tensor first
        order = list(leading)
    strides = [1] * x.dim()
    step = shape[-1]
    for d in reversed(order):
        strides[d] = step
        step = step * max(shape[d], 1)
    return torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device)
