"""Inputs of the cross_conditioning tests."""

import torch

from dreamkernels.ops.cross_conditioning import reference as definition

# pictures, conditions, positions, heads, keys, width: sizes around the vectors (8, 16), the tiles (6 rows, 64 columns),
# the blocks (48 positions) and the chunks (1024), and those of real models (77 keys; widths 40, 64, 80, 160).
CASES = (
    (0, 1, 5, 2, 4, 8),
    (2, 1, 0, 2, 4, 8),
    (1, 1, 1, 1, 1, 1),
    (2, 2, 3, 1, 2, 3),
    (4, 2, 49, 3, 64, 64),
    (3, 1, 30, 2, 77, 40),
    (2, 1, 53, 1, 65, 80),
    (1, 1, 13, 2, 128, 160),
    (2, 2, 97, 2, 17, 33),
)


def reference(q, k, v, scale=None):
    return definition.cross_conditioning(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)


def inputs(case, dtype, device="cpu", gain=1.0):
    """q, k, v; with a large gain the softmax is nearly one-hot."""
    pictures, conditions, positions, heads, keys, width = case
    q = gain * torch.randn(pictures, positions, heads, width, device=device)
    k, v = (torch.randn(conditions, keys, heads, width, device=device) for _ in range(2))
    return [t.to(dtype).requires_grad_() for t in (q, k, v)]


def tile_of(case):
    """Elements of the keys of a head as the GPU kernels hold them: both sizes rounded up to powers of two."""
    return 2 ** sum(max(4, (size - 1).bit_length()) for size in case[4:])


def trials(case):
    """Enough repetitions that a few thousand values are compared."""
    pictures, _, positions, heads, _, width = case
    return max(1, min(32, 4096 // max(1, pictures * positions * heads * width)))
