"""Inputs of the rms_norm tests."""

import torch

from dreamkernels.ops.rms_norm.reference import rms_norm

# Widths around the vector sizes (8, 16), the unrolled step (64), and real ones; rows around the blocks of 4 and the
# chunks of 16.
SHAPES = ((0, 8), (1, 1), (3, 1), (1, 7), (5, 16), (4, 17), (17, 63), (33, 65), (2, 3, 130), (70, 257), (6, 4096))


def reference(x, weight, residual=None, eps=1e-6):
    return rms_norm(x, weight, eps, residual)


def inputs(shape, dtype, device="cpu", residual=False, scale=1.0):
    x = (scale * torch.randn(shape, device=device)).to(dtype).requires_grad_()
    weight = (1 + 0.2 * torch.randn(shape[-1], device=device)).to(dtype).requires_grad_()
    if not residual:
        return [x, weight]
    return [x, weight, torch.randn(shape, device=device).to(dtype).requires_grad_()]


def trials(shape):
    """Enough repetitions that a few thousand values are compared."""
    return max(1, min(64, 2048 // max(1, torch.Size(shape).numel())))
