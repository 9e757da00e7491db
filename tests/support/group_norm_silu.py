"""Inputs of the group_norm_silu tests."""

import torch

from dreamkernels.ops.group_norm_silu import reference as definition

# (shape, groups): one channel per group, groups that end within a vector, positions around the vector sizes (8, 16),
# more positions than a block of channels last has, no position, no sample, and a map without spatial dimensions.
SHAPES = (
    ((2, 4, 3, 5), 4),
    ((1, 20, 4, 4), 2),
    ((3, 40, 7, 9), 4),
    ((2, 70, 5, 13), 7),
    ((2, 320, 6, 4), 32),
    ((1, 6, 1, 2), 3),
    ((2, 12, 97, 65), 2),
    ((0, 8, 4, 4), 2),
    ((2, 8, 0, 4), 2),
)
LAYOUTS = {"first": torch.contiguous_format, "last": torch.channels_last}


def reference(groups, activation="silu"):
    def run(x, weight=None, bias=None, shift=None):
        return definition.group_norm_silu(x, groups, weight, bias, 1e-5, activation, shift)

    return run


def inputs(shape, dtype, layout="first", device="cpu", scale=1.0, mean=0.0):
    """x, weight, bias, shift."""
    x = (mean + scale * torch.randn(shape, device=device)).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    weight = (1 + 0.2 * torch.randn(shape[1], device=device)).to(dtype)
    bias, shift = torch.randn(shape[1], device=device).to(dtype), torch.randn(shape[:2], device=device).to(dtype)
    return [t.requires_grad_() for t in (x, weight, bias, shift)]


def trials(shape):
    """Enough repetitions that a few hundred gradients of the weight are compared, the smallest results there are."""
    return max(4, min(32, 512 // shape[1])) if 0 not in shape else 1
