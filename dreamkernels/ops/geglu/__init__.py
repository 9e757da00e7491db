"""geglu: the gated linear unit of diffusion transformers' feed-forward layers, on the packed projection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dreamkernels.ops.geglu import reference
from dreamkernels.ops.operator import FLOAT_DTYPES, Autograd, choose, define, overload_for, row_major_like

__all__ = ["geglu"]

_TRITON = "dreamkernels.ops.geglu.triton"

BACKWARD = define(
    "geglu_backward",
    "(Tensor grad_y, Tensor x) -> Tensor",
    fake=lambda grad_y, x: row_major_like(x),
    triton=f"{_TRITON}:geglu_backward",
)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(backward: Any) -> Callable[..., Any]:
    def run(ctx, grad_y):
        return backward(grad_y, *ctx.saved_tensors)

    return run


GEGLU = define(
    "geglu",
    "(Tensor x) -> Tensor",
    fake=lambda x: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)),
    triton=f"{_TRITON}:geglu",
    autograd=Autograd(_backward, _save, BACKWARD),
)


def geglu(x: torch.Tensor, implementation: str = "auto") -> torch.Tensor:
    """Multiplies the first half of the last dimension by the exact GELU of the second half.

    y = x[..., :F] * GELU(x[..., F:]) with GELU(g) = g (1 + erf(g / sqrt 2)) / 2, computed in float32 and rounded once.
    What diffusers' GEGLU does after its projection. The backward keeps x only and writes the packed gradient in one
    pass. Shazeer, GLU Variants Improve Transformer, 2020.

    Args:
        x: [..., 2F], float32, bfloat16 or float16. Any strides; a non-contiguous x is copied first.
        implementation: "auto" (CPU: C++, CUDA: Triton), or one of "cpu", "triton", "reference".

    Returns:
        [..., F], contiguous. Differentiable with respect to x; results repeat bit for bit.

    Raises:
        ValueError: x has an unsupported dtype or an odd last dimension, or the implementation cannot run on its device.
    """
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"x has dtype {x.dtype}, which geglu does not support (float32, bfloat16, float16); cast it")
    if x.dim() < 1 or x.shape[-1] % 2:
        raise ValueError(
            f"x {list(x.shape)} must hold the hidden half and the gate half in its last dimension, so that must be even"
        )
    chosen = choose("geglu", implementation, x.device.type)
    if chosen == "reference":
        return reference.geglu(x)
    return overload_for(GEGLU, chosen, torch.is_grad_enabled() and x.requires_grad)(x)
