"""rms_norm: root mean square layer normalisation, with an optional residual add before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch

from dreamkernels.ops.operator import FLOAT_DTYPES, Autograd, choose, define, overload_for, row_major_like
from dreamkernels.ops.rms_norm import reference

__all__ = ["rms_norm"]

_TRITON = "dreamkernels.ops.rms_norm.triton"


def _fake_backward(grad_y, grad_residual, x, weight, eps, weight_grad):
    return row_major_like(x), weight.new_empty(weight.shape[0] if weight_grad else 0)


BACKWARD = define(
    "rms_norm_backward",
    "(Tensor grad_y, Tensor? grad_residual, Tensor x, Tensor weight, float eps, bool weight_grad) -> (Tensor, Tensor)",
    fake=_fake_backward,
    triton=f"{_TRITON}:rms_norm_backward",
)


def _save_for_rms_norm(ctx, inputs, output):
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward_of_rms_norm(backward: Any) -> Callable[..., Any]:
    def run(ctx, grad_y):
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = backward(grad_y, None, x, weight, ctx.eps, ctx.needs_input_grad[1])
        return grad_x, grad_weight if ctx.needs_input_grad[1] else None, None

    return run


def _save_for_add_rms_norm(ctx, inputs, output):
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)


def _backward_of_add_rms_norm(backward: Any) -> Callable[..., Any]:
    def run(ctx, grad_y, grad_residual):
        h, weight = ctx.saved_tensors
        grad_h, grad_weight = backward(grad_y, grad_residual, h, weight, ctx.eps, ctx.needs_input_grad[2])
        return grad_h, grad_h, grad_weight if ctx.needs_input_grad[2] else None, None

    return run


RMS_NORM = define(
    "rms_norm",
    "(Tensor x, Tensor weight, float eps) -> Tensor",
    fake=lambda x, weight, eps: row_major_like(x),
    triton=f"{_TRITON}:rms_norm",
    cuda=True,
    autograd=Autograd(_backward_of_rms_norm, _save_for_rms_norm, BACKWARD),
)
ADD_RMS_NORM = define(
    "add_rms_norm",
    "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    fake=lambda x, residual, weight, eps: (row_major_like(x), row_major_like(x)),
    triton=f"{_TRITON}:add_rms_norm",
    cuda=True,
    autograd=Autograd(_backward_of_add_rms_norm, _save_for_add_rms_norm, BACKWARD),
)


def _check(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> None:
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"x has dtype {x.dtype}, which rms_norm does not support (float32, bfloat16, float16); cast it"
        )
    if weight.dtype != x.dtype:
        raise ValueError(f"weight has dtype {weight.dtype} but x has {x.dtype}; cast one of them")
    if x.dim() < 1 or weight.dim() != 1 or x.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"x {list(x.shape)} needs a weight [{x.shape[-1] if x.dim() else 0}], not {list(weight.shape)}"
        )
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device} but x is on {x.device}; move one of them")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device):
        raise ValueError(
            f"residual {list(residual.shape)} {residual.dtype} on {residual.device} must have the shape, dtype and "
            f"device of x: {list(x.shape)} {x.dtype} on {x.device}"
        )


@overload
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float = ..., residual: None = ..., implementation: str = ...
) -> torch.Tensor: ...
@overload
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor, implementation: str = ...
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float = ..., *, residual: torch.Tensor, implementation: str = ...
) -> tuple[torch.Tensor, torch.Tensor]: ...


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
    implementation: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Normalises the last dimension of x by its root mean square and scales it by weight.

    y = weight * round(x / sqrt(mean(x^2) + eps)), with LLaMA's rounding: mean and quotient are computed in float32,
    the normalised value is rounded to the dtype of x and then multiplied. With a residual, h = x + residual (rounded to
    the dtype) is normalised. Where the processor has bfloat16 instructions, denormals (below 1.2e-38) count as 0.
    Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.

    Args:
        x: [..., H], float32, bfloat16 or float16. Any strides; a non-contiguous x is copied first.
        weight: [H], dtype and device of x.
        eps: added to the mean square.
        residual: shape, dtype and device of x, or None.
        implementation: "auto" (CPU: C++, CUDA: Triton), or one of "cpu", "triton", "cuda", "reference".

    Returns:
        y, contiguous, with the shape of x; with a residual (y, h), where h is the residual of the next layer.
        Differentiable with respect to x, weight and residual; the gradients are bitwise reproducible.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the implementation cannot run on the device of x.
    """
    _check(x, weight, residual)
    operator = RMS_NORM if residual is None else ADD_RMS_NORM
    chosen = choose(operator.name, implementation, x.device.type)
    if chosen == "reference":
        return reference.rms_norm(x, weight, eps, residual)
    needs_grad = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (residual is not None and residual.requires_grad)
    )
    run = overload_for(operator, chosen, needs_grad)
    return run(x, weight, eps) if residual is None else run(x, residual, weight, eps)
