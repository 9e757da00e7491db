"""group_norm_silu: group normalisation with a shift of the channels before it and SiLU after it, in either layout."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from dreamkernels.ops.group_norm_silu import reference
from dreamkernels.ops.operator import FLOAT_DTYPES, Autograd, choose, define, overload_for

__all__ = ["group_norm_silu", "layout_of"]

ACTIVATIONS = ("silu", "none")
_TRITON = "dreamkernels.ops.group_norm_silu.triton"


def layout_of(x: torch.Tensor) -> torch.memory_format:
    """The memory format that x is computed in, and its results have: channels last where x lies so (with gaps, as a
    slice of channels does, or without), else row-major. csrc/group_norm_silu/cpu.cpp decides alike."""
    if x.is_contiguous() or x.dim() not in (4, 5) or x.shape[1] == 1 or x.stride(1) != 1:
        return torch.contiguous_format
    outer = [x.stride(d) for d in (0, *range(2, x.dim())) if x.shape[d] != 1]
    if any(stride < following for stride, following in itertools.pairwise(outer)) or (outer and outer[-1] < x.shape[1]):
        return torch.contiguous_format
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


def _fake(x, shift, weight, bias, groups, eps, silu):
    statistics = [x.new_empty((x.shape[0], groups), dtype=torch.float32) for _ in range(2)]
    return torch.empty_like(x, memory_format=layout_of(x)), *statistics


def _fake_backward(grad_y, x, shift, weight, bias, mean, rstd, groups, silu, x_grad, affine_grad, shift_grad):
    channels = x.shape[1]
    affine = channels if affine_grad else 0
    return (
        torch.empty_like(x, memory_format=layout_of(x)) if x_grad else x.new_empty(0),
        x.new_empty(affine),
        x.new_empty(affine),
        x.new_empty((x.shape[0] if shift_grad else 0, channels)),
    )


BACKWARD = define(
    "group_norm_silu_backward",
    "(Tensor grad_y, Tensor x, Tensor? shift, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, int groups, "
    "bool silu, bool x_grad, bool affine_grad, bool shift_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    triton=f"{_TRITON}:group_norm_silu_backward",
)


def _save(ctx, inputs, output):
    x, shift, weight, bias, ctx.groups, _, ctx.silu = inputs
    ctx.save_for_backward(x, shift, weight, bias, output[1], output[2])
    ctx.set_materialize_grads(False)  # mean and rstd get none


def _backward(backward: Any) -> Callable[..., Any]:
    def run(ctx, grad_y, grad_mean, grad_rstd):
        x, shift, weight, bias, mean, rstd = ctx.saved_tensors
        if grad_y is None:
            return (None,) * 7
        x_needed, shift_needed, weight_needed, bias_needed, *_ = ctx.needs_input_grad
        grad_x, grad_weight, grad_bias, grad_shift = backward(
            grad_y,
            x,
            shift,
            weight,
            bias,
            mean,
            rstd,
            ctx.groups,
            ctx.silu,
            x_needed,
            weight_needed or bias_needed,
            shift_needed,
        )
        return (
            grad_x if x_needed else None,
            grad_shift if shift_needed else None,
            grad_weight if weight_needed else None,
            grad_bias if bias_needed else None,
            None,
            None,
            None,
        )

    return run


GROUP_NORM_SILU = define(
    "group_norm_silu",
    "(Tensor x, Tensor? shift, Tensor? weight, Tensor? bias, int groups, float eps, bool silu) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_fake,
    triton=f"{_TRITON}:group_norm_silu",
    autograd=Autograd(_backward, _save, BACKWARD),
)


def _check(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str,
    shift: torch.Tensor | None,
) -> None:
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"x has dtype {x.dtype}, which group_norm_silu does not support (float32, bfloat16, float16); cast it"
        )
    if x.dim() < 2:
        raise ValueError(f"x {list(x.shape)} must have a batch and a channel dimension: [N, C, ...]")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is unknown ({', '.join(ACTIVATIONS)})")
    samples, channels = x.shape[:2]
    if groups < 1 or channels % groups:
        possible = [count for count in range(1, channels + 1) if channels % count == 0]
        raise ValueError(f"{channels} channels cannot be divided into {groups} groups; possible are {possible}")
    for name, given, shape in (
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        ("shift", shift, (samples, channels)),
    ):
        if given is None:
            continue
        if given.shape != shape:
            raise ValueError(f"x {list(x.shape)} needs a {name} {list(shape)}, not {list(given.shape)}")
        if given.dtype != x.dtype:
            raise ValueError(f"{name} has dtype {given.dtype} but x has {x.dtype}; cast one of them")
        if given.device != x.device:
            raise ValueError(f"{name} is on {given.device} but x is on {x.device}; move one of them")


def group_norm_silu(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
    shift: torch.Tensor | None = None,
    implementation: str = "auto",
) -> torch.Tensor:
    """Normalises groups of channels, scales and shifts each channel, and applies SiLU: a UNet's most frequent pair.

    y = act((h - mean) / sqrt(var + eps) * weight + bias), h = x + shift[:, :, None, ...], with mean and variance of h
    over each sample's C / groups neighbouring channels and all positions. Computed in float32 and rounded once; a large
    mean does not cancel. The backward keeps x and the statistics only, and makes only the gradients that are needed.
    Wu and He, Group Normalization, 2018.

    Args:
        x: [N, C, ...], float32, bfloat16 or float16. Row-major, or torch.channels_last (channels_last_3d), which y and
            the gradient of x then keep; a slice of its channels is copied to it, any other strides to row-major.
        groups: divides C.
        weight: [C], dtype and device of x; None: ones.
        bias: [C], dtype and device of x; None: zeros.
        eps: added to the variance.
        activation: "silu" or "none".
        shift: [N, C], dtype and device of x, added before the norm (a time embedding); None: nothing.
        implementation: "auto" (CPU: C++, CUDA: Triton), or one of "cpu", "triton", "reference".

    Returns:
        y with the shape of x. Differentiable with respect to x, weight, bias and shift; the gradients are bitwise
        reproducible.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, C is not divisible by groups, the activation is unknown, or
            the implementation cannot run on the device of x.
    """
    _check(x, groups, weight, bias, activation, shift)
    chosen = choose("group_norm_silu", implementation, x.device.type)
    if chosen == "reference":
        return reference.group_norm_silu(x, groups, weight, bias, eps, activation, shift)
    needs_grad = torch.is_grad_enabled() and any(
        given is not None and given.requires_grad for given in (x, shift, weight, bias)
    )
    run = overload_for(GROUP_NORM_SILU, chosen, needs_grad)
    return run(x, shift, weight, bias, groups, eps, activation == "silu")[0]
