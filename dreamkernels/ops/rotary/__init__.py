"""rotary: rotary position embedding of queries and keys, and its tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dreamkernels.ops.debug import check_range, debug_enabled
from dreamkernels.ops.operator import FLOAT_DTYPES, Autograd, choose, define, overload_for
from dreamkernels.ops.rotary import reference
from dreamkernels.ops.rotary.layout import empty_in_memory_order_of
from dreamkernels.ops.rotary.tables import rotary_tables

__all__ = ["rotary", "rotary_tables"]

_TRITON = "dreamkernels.ops.rotary.triton"
_ARGUMENTS = "Tensor cos, Tensor sin, Tensor? position_ids, bool heads_first"
LAYOUTS = ("thd", "bhtd", "bthd")
HEADS_DIMENSION = {layout: layout.index("h") for layout in LAYOUTS}


def _fake(q, k, cos, sin, position_ids, heads_first):
    return empty_in_memory_order_of(q), empty_in_memory_order_of(k)


BACKWARD = define(
    "rotary_backward",
    f"(Tensor grad_q, Tensor grad_k, {_ARGUMENTS}) -> (Tensor, Tensor)",
    fake=_fake,
    triton=f"{_TRITON}:rotary_backward",
)


def _save(ctx, inputs, output):
    _, _, cos, sin, position_ids, ctx.heads_first = inputs
    ctx.save_for_backward(cos, sin, position_ids)


def _backward(backward: Any) -> Callable[..., Any]:
    def run(ctx, grad_q, grad_k):
        cos, sin, position_ids = ctx.saved_tensors
        return *backward(grad_q, grad_k, cos, sin, position_ids, ctx.heads_first), None, None, None, None

    return run


ROTARY = define(
    "rotary",
    f"(Tensor q, Tensor k, {_ARGUMENTS}) -> (Tensor, Tensor)",
    fake=_fake,
    triton=f"{_TRITON}:rotary",
    autograd=Autograd(_backward, _save, BACKWARD),
)
IN_PLACE = define(
    "rotary_",
    f"(Tensor(a!) q, Tensor(b!) k, {_ARGUMENTS}) -> ()",
    fake=lambda q, k, cos, sin, position_ids, heads_first: None,
    triton=f"{_TRITON}:rotary_",
)


def _check_states(q: torch.Tensor, k: torch.Tensor, layout: str) -> None:
    if q.dtype not in FLOAT_DTYPES:
        raise ValueError(f"q has dtype {q.dtype}, which rotary does not support (float32, bfloat16, float16); cast it")
    if k.dtype != q.dtype or k.device != q.device:
        raise ValueError(f"k is {k.dtype} on {k.device} but q is {q.dtype} on {q.device}; cast or move one of them")
    q_shape, k_shape, heads = q.shape, k.shape, HEADS_DIMENSION[layout]
    if len(q_shape) != len(layout) or len(k_shape) != len(layout):
        raise ValueError(
            f"q {list(q_shape)} and k {list(k_shape)} must have the {len(layout)} dimensions of the layout "
            f'"{layout}"; choose another of {", ".join(LAYOUTS)}'
        )
    if q_shape[:heads] != k_shape[:heads] or q_shape[heads + 1 :] != k_shape[heads + 1 :]:
        raise ValueError(
            f'q {list(q_shape)} and k {list(k_shape)} may differ in their number of heads only (layout "{layout}")'
        )


def _check_tables(
    q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position_ids: torch.Tensor | None, layout: str
) -> None:
    shape, dtype, device = cos.shape, cos.dtype, q.device
    if sin.shape != shape or sin.dtype != dtype:
        raise ValueError(
            f"cos {list(shape)} {dtype} and sin {list(sin.shape)} {sin.dtype} must have one shape and dtype"
        )
    if dtype != torch.float32 and dtype != q.dtype:
        raise ValueError(f"cos and sin have dtype {dtype}; with q {q.dtype} they must be {q.dtype} or float32")
    if cos.device != device or sin.device != device:
        raise ValueError(f"cos is on {cos.device} and sin on {sin.device} but q is on {device}; move them")
    q_shape = q.shape
    rotated = shape[-1] if shape else 0
    if rotated < 2 or rotated % 2 or rotated > q_shape[-1]:
        raise ValueError(
            f"cos and sin have {rotated} columns; they need an even number from 2 to the width of a head, {q_shape[-1]}"
        )
    batch = 1 if layout == "thd" else q_shape[0]
    tokens = q_shape[layout.index("t")]
    if position_ids is None:
        if not _one_per_token(shape[:-1], batch, tokens):
            raise ValueError(
                f"cos {list(shape)} must be [{tokens}, R] or [{batch} or 1, {tokens}, R] for q {list(q_shape)}; or "
                "give position_ids, which choose rows of a [positions, R] table"
            )
        return
    if len(shape) != 2:
        raise ValueError(f"cos {list(shape)} must be [positions, R] when position_ids choose its rows")
    if position_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"position_ids has dtype {position_ids.dtype} (int32 or int64); cast it")
    if not _one_per_token(position_ids.shape, batch, tokens):
        raise ValueError(
            f"position_ids {list(position_ids.shape)} must be [{tokens}] or [{batch} or 1, {tokens}] for q "
            f"{list(q_shape)}"
        )
    if position_ids.device != device:
        raise ValueError(f"position_ids is on {position_ids.device} but q is on {device}; move one of them")
    if debug_enabled():
        check_range("rotary", "position_ids", position_ids, 0, shape[0], meaning="the rows of cos and sin")


def _one_per_token(shape: torch.Size, batch: int, tokens: int) -> bool:
    if len(shape) == 1:
        return shape[0] == tokens
    return len(shape) == 2 and shape[1] == tokens and (shape[0] == batch or shape[0] == 1)


def rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    *,
    layout: str | None = None,
    inplace: bool = False,
    implementation: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates the first R channels of every query and key head by its position (rotary position embedding).

    Channel i is paired with channel i + R/2, as in LLaMA (`rotate_half`), not with its neighbour:

        y[i]       = x[i] cos[i]             - x[i + R/2] sin[i]
        y[i + R/2] = x[i + R/2] cos[i + R/2] + x[i] sin[i + R/2]         for i < R/2;  y[i] = x[i] for i >= R

    computed in float32 and rounded once to the dtype of q. (Eager PyTorch in bfloat16 rounds both products and their
    sum.) Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021.

    Args:
        q: [T, Hq, D] (layout "thd", packed), [B, Hq, T, D] ("bhtd") or [B, T, Hq, D] ("bthd"), float32, bfloat16 or
            float16. Any strides between rows, such as those of view(B, T, H, D).transpose(1, 2) or of a slice of a
            joint query-key-value product; only where the channels themselves are strided is it copied first.
        k: as q, with any number of heads.
        cos, sin: tables as `rotary_tables` makes them: [T, R] or [B or 1, T, R], the row of each token (transformers'
            `position_embeddings`), or with position_ids [positions, R]. R is even and at most D. Dtype of q, or
            float32. By convention both halves of a row are equal; where they differ the formula above holds, and the
            gradient is that of it.
        position_ids: int32 or int64, [T] or [B or 1, T]: the row of the tables for each token; or None.
            Every value must be a row. On CPU another value raises. On CUDA that would stop the host: values are checked
            within `dreamkernels.ops.debug.debug_checks()`, and otherwise taken as the nearest row.
        layout: "thd", "bhtd" or "bthd"; None: "thd" for three dimensions, "bhtd" for four.
        inplace: overwrites q and k and returns them. Only where no gradient is recorded, and where no two elements
            share memory.
        implementation: "auto" (CPU: C++, CUDA: Triton), or one of "cpu", "triton", "reference".

    Returns:
        (q, k), new tensors in the memory order of q and k (dense), or the given ones with inplace. Differentiable with
        respect to q and k: the gradient is rotated back. Only cos, sin and position_ids are kept for that.

    Raises:
        ValueError: shapes, dtypes, devices or layout do not fit, cos or sin requires a gradient, inplace is asked while
            a gradient is recorded, or the implementation cannot run on the device.
        RuntimeError: a position is not a row of the tables (CPU); it is named with its index.
    """
    layout = layout or ("thd" if q.dim() == 3 else "bhtd")
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is unknown ({', '.join(LAYOUTS)})")
    _check_states(q, k, layout)
    _check_tables(q, cos, sin, position_ids, layout)
    heads_first = layout == "bhtd"
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ValueError("cos or sin requires a gradient, which rotary does not give; detach them")
    chosen = choose(ROTARY.name, implementation, q.device.type)
    if inplace:
        _rotate_in_place(q, k, cos, sin, position_ids, heads_first, chosen, needs_grad)
        return q, k
    if chosen == "reference":
        return reference.rotary(q, k, cos, sin, position_ids, heads_first)
    return overload_for(ROTARY, chosen, needs_grad)(q, k, cos, sin, position_ids, heads_first)


def _rotate_in_place(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None,
    heads_first: bool,
    chosen: str,
    needs_grad: bool,
) -> None:
    if needs_grad:
        raise ValueError(
            "inplace=True while a gradient of q or k is recorded would overwrite values that autograd may still need; "
            "choose inplace=False, or call it under torch.no_grad()"
        )
    for name, x in (("q", q), ("k", k)):
        if x.stride(-1) != 1 or any(size > 1 and not s for size, s in zip(x.shape, x.stride(), strict=True)):
            raise ValueError(
                f"{name} with strides {list(x.stride())} cannot be rotated in place: channels must be adjacent and "
                "elements distinct; choose inplace=False"
            )
    if chosen == "reference":
        rotated_q, rotated_k = reference.rotary(q, k, cos, sin, position_ids, heads_first)
        q.copy_(rotated_q)
        k.copy_(rotated_k)
        return
    overload_for(IN_PLACE, chosen, needs_grad=False)(q, k, cos, sin, position_ids, heads_first)
