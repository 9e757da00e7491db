"""Inputs of the swiglu tests."""

import torch

from dreamkernels.ops.swiglu import reference

# Widths around the vectors of 8 and 16, and real ones; sizes around the pieces of 16384 elements that threads take.
SHAPES = ((0, 8), (3, 0), (1,), (3, 1), (1, 7), (5, 16), (4, 17), (2, 3, 130), (70, 257), (33, 1024))


def inputs(shape, dtype, device="cpu", scale=2.0):
    return [(scale * torch.randn(shape, device=device)).to(dtype).requires_grad_() for _ in range(2)]


def packed_inputs(shape, dtype, device="cpu"):
    return [(2 * torch.randn((*shape[:-1], 2 * shape[-1]), device=device)).to(dtype).requires_grad_()]


def trials(shape):
    """Enough repetitions that a few thousand values are compared."""
    return max(1, min(64, 2048 // max(1, torch.Size(shape).numel())))


def views():
    """Pairs (gate, up) of shape [4, 3, 10] with every kind of strides that a caller can bring."""
    joint, wide, cube = torch.randn(4, 3, 20), torch.randn(4, 3, 50), torch.randn(2, 3, 4, 10)
    row = torch.randn(2, 10)
    return {
        "column halves of one matrix": joint.chunk(2, -1),
        "columns of a wider matrix": (wide[..., 3:13], wide[..., 30:40]),
        "one dense, one strided": (cube[0].transpose(0, 1).contiguous(), wide[..., 1:11]),
        "transposed rows": cube.transpose(1, 2).unbind(),
        "strided columns": joint.unflatten(-1, (10, 2)).unbind(-1),
        "expanded rows": tuple(x.expand(4, 3, 10) for x in row),
        "every second row": torch.randn(2, 8, 3, 10)[:, ::2].unbind(),
        "misaligned": tuple(x[1:].view(4, 3, 10) for x in torch.randn(2, 121)),
    }


reference_of = {"swiglu": reference.swiglu, "swiglu_packed": reference.swiglu_packed}
