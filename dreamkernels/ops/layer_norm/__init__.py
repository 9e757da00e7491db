"""layer_norm: layer normalisation of the last dimension."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dreamkernels.ops.layer_norm import reference
from dreamkernels.ops.operator import FLOAT_DTYPES, Autograd, choose, define, overload_for, row_major_like

__all__ = ["layer_norm"]

_TRITON = "dreamkernels.ops.layer_norm.triton"


def _fake_backward(grad_y, x, weight, eps, affine_grad):
    width = x.shape[-1] if affine_grad else 0
    return row_major_like(x), x.new_empty(width), x.new_empty(width)


BACKWARD = define(
    "layer_norm_backward",
    "(Tensor grad_y, Tensor x, Tensor? weight, float eps, bool affine_grad) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    triton=f"{_TRITON}:layer_norm_backward",
)


def _save(ctx, inputs, output):
    x, weight, _, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(backward: Any) -> Callable[..., Any]:
    def run(ctx, grad_y):
        x, weight = ctx.saved_tensors
        _, weight_needed, bias_needed, _ = ctx.needs_input_grad
        affine = weight_needed or bias_needed
        grad_x, grad_weight, grad_bias = backward(grad_y, x, weight, ctx.eps, affine)
        return grad_x, grad_weight if weight_needed else None, grad_bias if bias_needed else None, None

    return run


LAYER_NORM = define(
    "layer_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    fake=lambda x, weight, bias, eps: row_major_like(x),
    triton=f"{_TRITON}:layer_norm",
    autograd=Autograd(_backward, _save, BACKWARD),
)


def _check(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> None:
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"x has dtype {x.dtype}, which layer_norm does not support (float32, bfloat16, float16); cast it"
        )
    if x.dim() < 1:
        raise ValueError("x has no dimension to normalise; layer_norm takes x [..., H]")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if parameter.dtype != x.dtype:
            raise ValueError(f"{name} has dtype {parameter.dtype} but x has {x.dtype}; cast one of them")
        if parameter.dim() != 1 or x.shape[-1] != parameter.shape[0]:
            raise ValueError(f"x {list(x.shape)} needs a {name} [{x.shape[-1]}], not {list(parameter.shape)}")
        if parameter.device != x.device:
            raise ValueError(f"{name} is on {parameter.device} but x is on {x.device}; move one of them")


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float = 1e-5,
    implementation: str = "auto",
) -> torch.Tensor:
    """Normalises the last dimension of x to mean 0 and variance 1, scales it by weight and adds bias.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, computed in float32 and rounded once, as F.layer_norm does.
    The variance is that of differences to the mean (two passes), so a large mean does not cancel. The backward keeps
    x and weight only. Ba, Kiros and Hinton, Layer Normalization, 2016.

    Args:
        x: [..., H], float32, bfloat16 or float16. Any strides; a non-contiguous x is copied first.
        weight: [H], dtype and device of x; None: ones.
        bias: [H], dtype and device of x; None: zeros.
        eps: added to the variance.
        implementation: "auto" (CPU: C++, CUDA: Triton), or one of "cpu", "triton", "reference".

    Returns:
        y, contiguous, with the shape of x. Differentiable with respect to x, weight and bias; the gradients are bitwise
        reproducible.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the implementation cannot run on the device of x.
    """
    _check(x, weight, bias)
    chosen = choose("layer_norm", implementation, x.device.type)
    if chosen == "reference":
        return reference.layer_norm(x, weight, bias, eps)
    needs_grad = torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    )
    return overload_for(LAYER_NORM, chosen, needs_grad)(x, weight, bias, eps)
