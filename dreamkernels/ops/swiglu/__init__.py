"""swiglu: the gated activation of LLaMA's feed-forward layer, on two tensors or on one that holds both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dreamkernels.ops.operator import FLOAT_DTYPES, Autograd, choose, define, overload_for, row_major_like
from dreamkernels.ops.swiglu import reference

__all__ = ["swiglu", "swiglu_packed"]

_TRITON = "dreamkernels.ops.swiglu.triton"


def _fake_packed(gate_up):
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


BACKWARD = define(
    "swiglu_backward",
    "(Tensor grad_y, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    fake=lambda grad_y, gate, up: (row_major_like(gate), row_major_like(gate)),
    triton=f"{_TRITON}:swiglu_backward",
)
PACKED_BACKWARD = define(
    "swiglu_packed_backward",
    "(Tensor grad_y, Tensor gate_up) -> Tensor",
    fake=lambda grad_y, gate_up: row_major_like(gate_up),
    triton=f"{_TRITON}:swiglu_packed_backward",
)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(backward: Any) -> Callable[..., Any]:
    return lambda ctx, grad_y: backward(grad_y, *ctx.saved_tensors)


SWIGLU = define(
    "swiglu",
    "(Tensor gate, Tensor up) -> Tensor",
    fake=lambda gate, up: row_major_like(gate),
    triton=f"{_TRITON}:swiglu",
    autograd=Autograd(_backward, _save, BACKWARD),
)
SWIGLU_PACKED = define(
    "swiglu_packed",
    "(Tensor gate_up) -> Tensor",
    fake=_fake_packed,
    triton=f"{_TRITON}:swiglu_packed",
    autograd=Autograd(_backward, _save, PACKED_BACKWARD),
)


def _check_dtype(name: str, x: torch.Tensor) -> None:
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"{name} has dtype {x.dtype}, which swiglu does not support (float32, bfloat16, float16); cast it"
        )


def swiglu(gate: torch.Tensor, up: torch.Tensor, implementation: str = "auto") -> torch.Tensor:
    """y = silu(gate) * up, with silu(x) = x / (1 + exp(-x)), computed in float32 and rounded once.

    Eager PyTorch in bfloat16 or float16 rounds silu(gate) before the product: its results differ in the last place.
    Shazeer, GLU Variants Improve Transformer, 2020.

    Args:
        gate: [..., N], float32, bfloat16 or float16. Rows may be strided, as column halves of one matrix are; a tensor
            whose leading dimensions do not form rows at one distance, or with strided columns, is copied first.
        up: shape, dtype and device of gate; strides of its own.
        implementation: "auto" (CPU: C++, CUDA: Triton), or one of "cpu", "triton", "reference".

    Returns:
        y, contiguous, with the shape of gate. Differentiable with respect to both; gate and up are all that is kept for
        it, and one pass computes both gradients.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the implementation cannot run on the device of gate.
    """
    _check_dtype("gate", gate)
    if up.shape != gate.shape or up.dtype != gate.dtype or up.device != gate.device:
        raise ValueError(
            f"up {list(up.shape)} {up.dtype} on {up.device} must have the shape, dtype and device of gate: "
            f"{list(gate.shape)} {gate.dtype} on {gate.device}"
        )
    if gate.dim() < 1:
        raise ValueError("gate and up need at least one dimension; reshape them to [1]")
    chosen = choose(SWIGLU.name, implementation, gate.device.type)
    if chosen == "reference":
        return reference.swiglu(gate, up)
    needs_grad = torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)
    return overload_for(SWIGLU, chosen, needs_grad)(gate, up)


def swiglu_packed(gate_up: torch.Tensor, implementation: str = "auto") -> torch.Tensor:
    """`swiglu` of the two halves of the last dimension, as one projection makes them: [gate | up].

    Args:
        gate_up: [..., 2 N], float32, bfloat16 or float16; strides as in `swiglu`.
        implementation: "auto" (CPU: C++, CUDA: Triton), or one of "cpu", "triton", "reference".

    Returns:
        [..., N], contiguous. Differentiable: the gradient is written as one tensor [..., 2 N], without concatenation.

    Raises:
        ValueError: the last dimension is odd, the dtype is not supported, or the implementation cannot run there.
    """
    _check_dtype("gate_up", gate_up)
    if gate_up.dim() < 1 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up {list(gate_up.shape)} must have an even last dimension: [..., gate | up]")
    chosen = choose(SWIGLU_PACKED.name, implementation, gate_up.device.type)
    if chosen == "reference":
        return reference.swiglu_packed(gate_up)
    needs_grad = torch.is_grad_enabled() and gate_up.requires_grad
    return overload_for(SWIGLU_PACKED, chosen, needs_grad)(gate_up)
