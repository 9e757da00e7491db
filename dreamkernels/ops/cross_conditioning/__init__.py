"""cross_conditioning: attention of image positions to the few keys of a condition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dreamkernels.ops.cross_conditioning import reference
from dreamkernels.ops.operator import FLOAT_DTYPES, Autograd, choose, define, overload_for, row_major_like

__all__ = ["MAX_KEYS", "MAX_WIDTH", "cross_conditioning"]

MAX_KEYS, MAX_WIDTH = 128, 160

_TRITON = "dreamkernels.ops.cross_conditioning.triton"


def _row_major_or_nothing(x: torch.Tensor, wanted: bool) -> torch.Tensor:
    return row_major_like(x) if wanted else x.new_empty(0)


def _fake_backward(grad_out, q, k, v, scale, q_grad, kv_grad):
    return tuple(_row_major_or_nothing(x, wanted) for x, wanted in ((q, q_grad), (k, kv_grad), (v, kv_grad)))


BACKWARD = define(
    "cross_conditioning_backward",
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, float scale, bool q_grad, bool kv_grad)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    triton=f"{_TRITON}:cross_conditioning_backward",
)


def _save(ctx, inputs, output):
    q, k, v, ctx.scale = inputs
    ctx.save_for_backward(q, k, v)


def _backward(backward: Any) -> Callable[..., Any]:
    def run(ctx, grad_out):
        q_grad, k_grad, v_grad, _ = ctx.needs_input_grad
        grad_q, grad_k, grad_v = backward(grad_out, *ctx.saved_tensors, ctx.scale, q_grad, k_grad or v_grad)
        return grad_q if q_grad else None, grad_k if k_grad else None, grad_v if v_grad else None, None

    return run


CROSS_CONDITIONING = define(
    "cross_conditioning",
    "(Tensor q, Tensor k, Tensor v, float scale) -> Tensor",
    fake=lambda q, k, v, scale: row_major_like(q),
    triton=f"{_TRITON}:cross_conditioning",
    cuda=True,
    autograd=Autograd(_backward, _save, BACKWARD),
)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if q.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"q has dtype {q.dtype}, which cross_conditioning does not support (float32, bfloat16, float16); cast it"
        )
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"k and v have dtypes {k.dtype} and {v.dtype} but q has {q.dtype}; cast them")
    if k.device != q.device or v.device != q.device:
        raise ValueError(f"k and v are on {k.device} and {v.device} but q is on {q.device}; move them")
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or k.shape[2:] != q.shape[2:]:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit; needed are "
            "q [pictures, positions, heads, width] and k, v [conditions, keys, heads, width]"
        )
    if not (q.shape[0] % k.shape[0] == 0 if k.shape[0] else q.shape[0] == 0):
        raise ValueError(
            f"{q.shape[0]} pictures cannot share {k.shape[0]} conditions; "
            "the number of pictures must be a multiple of the number of conditions"
        )
    if not 1 <= k.shape[1] <= MAX_KEYS:
        raise ValueError(
            f"{k.shape[1]} keys are not supported (1 to {MAX_KEYS}); use torch's scaled_dot_product_attention or "
            'implementation="reference"'
        )
    if not 1 <= q.shape[3] <= MAX_WIDTH:
        raise ValueError(
            f'head width {q.shape[3]} is not supported (1 to {MAX_WIDTH}); choose implementation="reference"'
        )


def cross_conditioning(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    implementation: str = "auto",
) -> torch.Tensor:
    """Attention of image positions to the keys of a condition: softmax(scale q k^T) v for each head.

    Made for the cross-attention of a diffusion UNet, where thousands of positions attend to the 64 states of a dream
    (or the 77 of a text). All keys of a head are in one tile, so the softmax takes one pass, and the backward makes it
    anew instead of keeping anything: only q, k and v are saved. Products are summed and the softmax is taken in
    float32.
    Vaswani et al., Attention Is All You Need, 2017, equation 1.

    Args:
        q: [pictures, positions, heads, width], float32, bfloat16 or float16. Any strides; copied first only if the
            last dimension is not dense. Width 1 to 160.
        k, v: [conditions, keys, heads, width], 1 to 128 keys; dtype and device of q, any strides as q. Pictures must
            be a multiple of conditions: picture p attends to condition p // (pictures // conditions), so several
            pictures share a condition that is held once.
        scale: factor of the products; width ** -0.5 when None.
        implementation: "auto" (CPU: C++, CUDA: Triton), or one of "cpu", "triton", "cuda" (bfloat16 and float16, widths
            up to 64 that are multiples of 8; the backward is Triton's), "reference".

    Returns:
        [pictures, positions, heads, width], contiguous. Differentiable with respect to q, k and v; the gradients of k
        and v are sums over all pictures and positions of the condition, bitwise reproducible.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the implementation cannot run on the device of q.
    """
    if implementation != "reference":
        _check(q, k, v)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    chosen = choose("cross_conditioning", implementation, q.device.type)
    if chosen == "reference":
        return reference.cross_conditioning(q, k, v, scale)
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return overload_for(CROSS_CONDITIONING, chosen, needs_grad)(q, k, v, scale)
