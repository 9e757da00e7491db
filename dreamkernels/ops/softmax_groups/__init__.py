"""softmax_groups_: softmax of every group of successive elements, in place."""

from __future__ import annotations

import torch

from dreamkernels.ops.operator import FLOAT_DTYPES, choose, define, overload_for
from dreamkernels.ops.softmax_groups import reference

__all__ = ["MAX_SIZE", "softmax_groups_"]

MAX_SIZE = 128

SOFTMAX_GROUPS = define(
    "softmax_groups",
    "(Tensor(a!) x, int size) -> ()",
    fake=lambda x, size: None,
    triton="dreamkernels.ops.softmax_groups.triton:softmax_groups",
)


def softmax_groups_(x: torch.Tensor, size: int, implementation: str = "auto") -> torch.Tensor:
    """Replaces every group of `size` successive elements of x by its softmax, computed in float32, and returns x.

    The attention weights of all heads at once, where logits [.., heads * keys] come out of one product (folded
    cross-attention). For inference: no gradient.

    Args:
        x: [..., groups * size], contiguous, float32, bfloat16 or float16; not recorded by autograd.
        size: 1 to 128.
        implementation: "auto" (CPU: C++, CUDA: Triton), or one of "cpu", "triton", "reference".

    Raises:
        ValueError: x is not contiguous, needs a gradient, has another dtype, or is not made of groups.
    """
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"x has dtype {x.dtype}, which softmax_groups_ does not support (float32, bfloat16, float16); cast it"
        )
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"groups of {size} are not supported (1 to {MAX_SIZE}); use torch.softmax")
    if x.dim() < 1 or x.shape[-1] % size:
        raise ValueError(f"x {list(x.shape)} is not made of groups of {size}; its last dimension must be a multiple")
    if not x.is_contiguous():
        raise ValueError("x must be contiguous, because it is replaced in place; pass x.contiguous()")
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("softmax_groups_ has no gradient; call it under torch.no_grad() or use torch.softmax")
    chosen = choose("softmax_groups", implementation, x.device.type)
    if chosen == "reference":
        return x.copy_(reference.softmax_groups(x, size))
    overload_for(SOFTMAX_GROUPS, chosen, needs_grad=False)(x, size)
    return x
