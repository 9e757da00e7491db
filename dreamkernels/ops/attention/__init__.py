"""attention: scaled dot-product attention over packed sequences or dense batches, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import torch

from dreamkernels.ops.attention import external, reference
from dreamkernels.ops.attention.choice import Request, choose, explanation_of, rounded_head_dim
from dreamkernels.ops.explanation import Explanation
from dreamkernels.ops.operator import FLOAT_DTYPES, Autograd, define, overload_for, row_major_like

__all__ = ["attention"]

_TRITON = "dreamkernels.ops.attention.triton"
_OPTIONS = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? constant_kv_prefix, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "bool causal, float scale, int window, float softcap"
)


def _fake(q, k, v, *options):
    lse_shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return row_major_like(q), q.new_empty(lse_shape, dtype=torch.float32)


def _fake_backward(grad_out, grad_lse, q, k, v, *options):
    return row_major_like(q), row_major_like(k), row_major_like(v)


BACKWARD = define(
    "attention_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    triton=f"{_TRITON}:attention_backward",
)


def _save(ctx, inputs, output):
    q, k, v, cu_seqlens_q, cu_seqlens_k, constant_kv_prefix, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k, constant_kv_prefix)
    ctx.set_materialize_grads(False)


def _backward_of_attention(backward: Any) -> Callable[..., Any]:
    def run(ctx, grad_out, grad_lse):
        q, k, v, out, lse, *lengths = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return (None,) * 12
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        return *backward(grad_out, grad_lse, q, k, v, out, lse, *lengths, *ctx.options), *(None,) * 9

    return run


def _explain(*arguments: Any, **options: Any) -> Explanation:
    call = _checked(*arguments, **options)
    return explanation_of(call.implementation, call.request)


ATTENTION = define(
    "attention",
    f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    fake=_fake,
    triton=f"{_TRITON}:attention",
    autograd=Autograd(_backward_of_attention, _save, BACKWARD),
    external=external.UNAVAILABLE,
    explain=_explain,
)


def _check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: bool) -> None:
    dims, layout = (3, "[T, H, D]") if packed else (4, "[B, T, H, D]")
    if q.dim() != dims or k.dim() != dims or k.shape != v.shape:
        advice = "" if packed else "; give cu_seqlens_q and cu_seqlens_k for packed [T, H, D]"
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} must be {layout}, with k and v alike{advice}"
        )
    if k.shape[-1] != q.shape[-1] or (not packed and k.shape[0] != q.shape[0]):
        raise ValueError(f"q {list(q.shape)} and k {list(k.shape)} must agree in batch and head width")
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"q has {heads} heads, which is not a multiple of the {kv_heads} heads of k and v")
    if q.shape[-1] < 1:
        raise ValueError(f"q {list(q.shape)} has heads of width 0")
    if q.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"q has dtype {q.dtype}, which attention does not support (float32, bfloat16, float16); cast it"
        )
    for name, other in (("k", k), ("v", v)):
        if other.dtype != q.dtype or other.device != q.device:
            raise ValueError(
                f"{name} is {other.dtype} on {other.device} but q is {q.dtype} on {q.device}; cast or move it"
            )


def _check_lengths(name: str, cu_seqlens: torch.Tensor, max_seqlen: int | None, q: torch.Tensor) -> None:
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"cu_seqlens_{name} must be int32 [N + 1], not {cu_seqlens.dtype} {list(cu_seqlens.shape)}; "
            "it starts with 0 and ends with the number of tokens"
        )
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens_{name} is on {cu_seqlens.device} but q is on {q.device}; move it")
    if max_seqlen is None:
        raise ValueError(
            f"packed sequences need max_seqlen_{name}: the length of the longest one, as an int (reading it from "
            f"cu_seqlens_{name} would stop the host)"
        )


def _check_options(scale: float, window: int | None, softcap: float | None) -> None:
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite, not {scale}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (the aligned position itself) or None, not {window}")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap must be positive and finite or None, not {softcap}")


def _prefix(constant_kv_prefix: int | torch.Tensor, sequences: int, q: torch.Tensor) -> torch.Tensor | None:
    if isinstance(constant_kv_prefix, torch.Tensor):
        given = constant_kv_prefix
        if given.dtype != torch.int32 or list(given.shape) != [sequences] or given.device != q.device:
            raise ValueError(
                f"constant_kv_prefix must be an int or int32 [{sequences}] on {q.device} (one entry per sequence), "
                f"not {given.dtype} {list(given.shape)} on {given.device}"
            )
        return given
    if constant_kv_prefix < 0:
        raise ValueError(f"constant_kv_prefix must not be negative, as {constant_kv_prefix} is")
    if constant_kv_prefix == 0:
        return None
    return torch.full((sequences,), constant_kv_prefix, dtype=torch.int32, device=q.device)


class _Call(NamedTuple):
    """A checked call: what its implementation is chosen by, and its options as the operator takes them."""

    implementation: str
    request: Request
    prefix: torch.Tensor | None
    scale: float
    window: int  # -1: none
    softcap: float  # 0: none


def _checked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    constant_kv_prefix: int | torch.Tensor = 0,
    return_lse: bool = False,
    implementation: str = "auto",
) -> _Call:
    packed = cu_seqlens_q is not None
    if (cu_seqlens_k is not None) != packed:
        raise ValueError("cu_seqlens_q and cu_seqlens_k must both be given (packed sequences) or neither (dense batch)")
    _check_shapes(q, k, v, packed)
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        _check_lengths("q", cu_seqlens_q, max_seqlen_q, q)
        _check_lengths("k", cu_seqlens_k, max_seqlen_k, q)
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            raise ValueError(
                f"cu_seqlens_q and cu_seqlens_k count {cu_seqlens_q.shape[0] - 1} and {cu_seqlens_k.shape[0] - 1} "
                "sequences; they must be the same sequences"
            )
        sequences = cu_seqlens_q.shape[0] - 1
    elif max_seqlen_q is not None or max_seqlen_k is not None:
        raise ValueError(
            "max_seqlen_q and max_seqlen_k belong to cu_seqlens; a dense batch has its lengths in its shape"
        )
    else:
        sequences = q.shape[0]
    head_dim = q.shape[-1]
    scale = head_dim**-0.5 if scale is None else scale
    _check_options(scale, window, softcap)
    prefix = _prefix(constant_kv_prefix, sequences, q)
    request = Request(
        device_type=q.device.type,
        dtype=q.dtype,
        head_dim=rounded_head_dim(head_dim),
        alignment=8 if head_dim % 8 == 0 else 1,
        packed=packed,
        window=window is not None,
        softcap=softcap is not None,
        constant_kv_prefix=prefix is not None,
        return_lse=return_lse,
    )
    return _Call(implementation, request, prefix, scale, window or -1, softcap or 0.0)


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = ...,
    cu_seqlens_k: torch.Tensor | None = ...,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    causal: bool = ...,
    scale: float | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    constant_kv_prefix: int | torch.Tensor = ...,
    return_lse: Literal[False] = ...,
    implementation: str = ...,
) -> torch.Tensor: ...
@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = ...,
    cu_seqlens_k: torch.Tensor | None = ...,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    causal: bool = ...,
    scale: float | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    constant_kv_prefix: int | torch.Tensor = ...,
    *,
    return_lse: Literal[True],
    implementation: str = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    constant_kv_prefix: int | torch.Tensor = 0,
    return_lse: bool = False,
    implementation: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Scaled dot-product attention: softmax(scale * q k^T) v for each head of each sequence.

    Masks are aligned at the end, where the last query meets the last key (bottom right): with L_q queries and L_k keys,
    query i stands at position c = i + L_k - L_q among the keys.

        causal                    causal, L_q = 3         causal, L_q = 5        causal,       not causal,
        L_q = L_k = 5             L_k = 5                 L_k = 3                window = 2    window = 2

          keys                      keys                    keys                 x . . . .     x x . . .
        q x . . . .               q x x x . .             q . . .   row: zeros   x x . . .     x x x . .
        u x x . . .               u x x x x .             u . . .   and -inf     . x x . .     . x x x .
        e x x x . .               e x x x x x             e x . .                . . x x .     . . x x x
        r x x x x .                                       r x x .                . . . x x     . . . x x
        y x x x x x                                       y x x x

    A causal query sees keys j <= c, with a window also j > c - window; without causality a window is |j - c| < window.
    A row that sees no key, because of the mask or because its sequence has no keys, gives zeros and lse = -inf, and
    gradients of zero. Sequences may be empty on either side.

    Memory is linear in the lengths: Dao et al., FlashAttention, 2022; Dao, FlashAttention-2, 2023.

    Args:
        q: [T_q, H, D] with cu_seqlens, or [B, T_q, H, D]; float32, bfloat16 or float16. Any strides whose last is 1,
            such as slices of one projection or transposed views, are read in place; other layouts are copied first.
        k, v: [T_k, H_kv, D] or [B, T_k, H_kv, D], dtype and device of q. H is a multiple of H_kv: heads of q in
            consecutive groups of H / H_kv share one head of k and v.
        cu_seqlens_q, cu_seqlens_k: int32 [N + 1], the first token of each sequence and the number of all tokens; both
            or neither. Sequence n attends to sequence n only.
        max_seqlen_q, max_seqlen_k: the longest sequence of each side, needed with cu_seqlens. On CUDA it is trusted:
            with too small a value the rows beyond it are undefined.
        causal: see the drawings.
        scale: positive; None: D ** -0.5.
        window: at least 1, or None.
        softcap: c > 0 replaces each scaled score s by c * tanh(s / c), before the mask; None: no cap.
        constant_kv_prefix: int or int32 [N or B]: that many first keys of each sequence are constants, as keys of a
            frozen prompt are; their rows of the gradients of k and v are zero and cost nothing.
        return_lse: also return the natural logarithm of the softmax's denominator. It is differentiable.
        implementation: "auto" (by the table of the device, see `dreamkernels.explain`), or one of "cpu", "triton",
            "cuda", "reference", "sdpa" (torch's scaled_dot_product_attention), "flash_attn" (the package flash-attn).

    Returns:
        out: contiguous, shape and dtype of q. With return_lse also lse, float32, [H, T_q] packed or [B, H, T_q].
        Results and gradients of "cpu", "triton" and "reference" repeat bit for bit; no faster variant gives that up.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit, or the implementation cannot run this call.
    """
    call = _checked(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        causal,
        scale,
        window,
        softcap,
        constant_kv_prefix,
        return_lse,
        implementation,
    )
    chosen = choose(implementation, *call.request)
    if chosen == "sdpa":
        return external.sdpa(q, k, v, call.prefix, causal, call.scale, call.window)
    lengths = (max_seqlen_q or 0, max_seqlen_k or 0)
    mask = (causal, call.scale, call.window, call.softcap)
    if chosen == "flash_attn":
        return external.flash_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, lengths, mask)
    tensors = (q, k, v, cu_seqlens_q, cu_seqlens_k, call.prefix)
    if chosen == "reference":
        out, lse = reference.attention(*tensors, *mask)
    else:
        needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        out, lse = overload_for(ATTENTION, chosen, needs_grad)(*tensors, *lengths, *mask)
    return (out, lse) if return_lse else out
