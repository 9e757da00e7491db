"""Inputs of the geglu tests."""

import torch

from dreamkernels.ops.geglu.reference import geglu as reference  # noqa: F401

# Output widths around the vector sizes (8, 16), and real ones.
SHAPES = ((0, 16), (3, 0), (1, 2), (3, 2), (5, 14), (4, 32), (17, 34), (2, 3, 126), (7, 260), (3, 2560))


def inputs(shape, dtype, device="cpu", scale=1.5):
    return [(scale * torch.randn(shape, device=device)).to(dtype).requires_grad_()]


def trials(shape):
    """Enough repetitions that a few thousand values are compared."""
    return max(1, min(64, 4096 // max(1, torch.Size(shape).numel())))
