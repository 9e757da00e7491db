"""Inputs of the layer_norm tests."""

import torch

from dreamkernels.ops.layer_norm.reference import layer_norm

# Widths around the vector sizes (8, 16), the unrolled step (64), and real ones; rows around the blocks of 4 and the
# chunks of 16.
SHAPES = ((0, 8), (3, 2), (1, 7), (5, 16), (4, 17), (17, 63), (33, 65), (2, 3, 130), (70, 320), (6, 1280))


def reference(x, weight, bias):
    return layer_norm(x, weight, bias, 1e-5)


def inputs(shape, dtype, device="cpu", scale=1.0, mean=0.0):
    x = (mean + scale * torch.randn(shape, device=device)).to(dtype).requires_grad_()
    weight = (1 + 0.2 * torch.randn(shape[-1], device=device)).to(dtype).requires_grad_()
    bias = torch.randn(shape[-1], device=device).to(dtype).requires_grad_()
    return [x, weight, bias]


def trials(shape):
    """Enough repetitions that a few thousand values are compared."""
    return max(1, min(64, 2048 // max(1, torch.Size(shape).numel())))
