"""decode_attention: 1 to 128 new queries per sequence against a key-value cache, split over the keys."""

from __future__ import annotations

from typing import Literal, overload

import torch

from dreamkernels.ops.debug import check_range, debug_enabled
from dreamkernels.ops.decode_attention import reference
from dreamkernels.ops.operator import FLOAT_DTYPES, choose, define, overload_for, row_major_like

__all__ = ["decode_attention"]

MAX_TOKENS = 128
MAX_SPLITS = 64


def _fake(q, k_cache, v_cache, cache_seqlens, block_table, causal, scale, window, softcap, splits):
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    return row_major_like(q), lse


DECODE_ATTENTION = define(
    "decode_attention",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor? block_table, bool causal, float scale, "
    "int window, float softcap, int splits) -> (Tensor, Tensor)",
    fake=_fake,
    triton="dreamkernels.ops.decode_attention.triton:decode_attention",
    cuda=True,
)


def _check_states(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, paged: bool) -> None:
    if q.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"q has dtype {q.dtype}, which decode_attention does not support (float32, bfloat16, float16); cast it"
        )
    if q.dim() != 4 or k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"q {list(q.shape)} must be [B, N, Hq, D]; k_cache {list(k_cache.shape)} and v_cache {list(v_cache.shape)} "
            f"must be [{'pages, page_size' if paged else 'B, S'}, Hk, D]"
        )
    heads, kv_heads, width = q.shape[2], k_cache.shape[2], q.shape[3]
    if k_cache.shape[3] != width or width < 1 or (not paged and k_cache.shape[0] != q.shape[0]):
        raise ValueError(f"q {list(q.shape)} and k_cache {list(k_cache.shape)} must agree in batch and head width")
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"q has {heads} heads, which is not a multiple of the {kv_heads} heads of the caches")
    if q.shape[1] > MAX_TOKENS:
        raise ValueError(f"q has {q.shape[1]} tokens per sequence (at most {MAX_TOKENS}); use attention for a prompt")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dtype != q.dtype or cache.device != q.device:
            raise ValueError(
                f"{name} is {cache.dtype} on {cache.device} but q is {q.dtype} on {q.device}; cast or move one of them"
            )
        if width > 1 and cache.stride(3) != 1:
            raise ValueError(
                f"{name} with strides {list(cache.stride())} must have adjacent channels: copying a cache at every "
                "token would cost more than the attention"
            )


def _check_integers(name: str, x: torch.Tensor, q: torch.Tensor, shape: str, fits: bool) -> None:
    if x.dtype != torch.int32 or not fits:
        raise ValueError(f"{name} {list(x.shape)} {x.dtype} must be int32 {shape} for q {list(q.shape)}")
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device} but q is on {q.device}; move it")


def _check_options(scale: float, window: int | None, softcap: float | None, splits: int | None) -> None:
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite, not {scale}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (the query's own position) or None, not {window}")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap must be positive and finite or None, not {softcap}")
    if splits is not None and not 1 <= splits <= MAX_SPLITS:
        raise ValueError(f"splits must be from 1 to {MAX_SPLITS}, or None, not {splits}")


def _check_values(cache_seqlens: torch.Tensor, k_cache: torch.Tensor, block_table: torch.Tensor | None) -> None:
    page_size = k_cache.shape[1]
    capacity = page_size * (1 if block_table is None else block_table.shape[1])
    check_range(
        "decode_attention",
        "cache_seqlens",
        cache_seqlens,
        0,
        capacity + 1,
        meaning=f"{capacity} positions in the cache",
    )
    if block_table is not None:
        page = torch.arange(block_table.shape[1], device=block_table.device)
        pages = torch.where(page * page_size < cache_seqlens[:, None], block_table, 0)
        check_range("decode_attention", "block_table", pages, 0, k_cache.shape[0], meaning="the pages of the cache")


@overload
def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    block_table: torch.Tensor | None = ...,
    scale: float | None = ...,
    causal: bool = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    splits: int | None = ...,
    return_lse: Literal[False] = ...,
    implementation: str = ...,
) -> torch.Tensor: ...
@overload
def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    block_table: torch.Tensor | None = ...,
    scale: float | None = ...,
    causal: bool = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    splits: int | None = ...,
    return_lse: Literal[True],
    implementation: str = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    block_table: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    splits: int | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of N new queries per sequence to a key-value cache that already holds their own keys and values.

    Query n of sequence b stands at position c = cache_seqlens[b] - N + n and, when causal, sees the keys j <= c:

        N = 3, cache_seqlens[b] = 6       keys  0 1 2 3 4 5
                                       query 0  x x x x . .
                                             1  x x x x x .
                                             2  x x x x x x

    With a window it sees the keys c - window < j only (without causality |j - c| < window). The mask is that of
    `attention`. A query that sees no key, as in an empty sequence, gives zeros and lse = -inf.

    The keys of a sequence are divided into parts that are attended to at the same time and joined in a fixed order, so
    that one query keeps a whole device busy: Dao et al., Flash-Decoding for long-context inference, 2023.

    Args:
        q: [B, N, Hq, D], N from 0 to 128, float32, bfloat16 or float16. Strides as they are; only where the channels
            are not adjacent is it copied first.
        k_cache, v_cache: [B, S, Hk, D]; or, with a block_table, [pages, page_size, Hk, D], as `append_kv` writes them.
            Hq is a multiple of Hk: heads of q in consecutive groups share one head of the cache. Any strides with
            adjacent channels.
        cache_seqlens: int32 [B], the keys of each sequence including those of the N new tokens.
        block_table: int32 [B, max_pages]: position p of sequence b is slot p % page_size of page
            block_table[b, p // page_size]. Entries of pages beyond a sequence's length are not used.
        scale: of the scores; None: D ** -0.5.
        causal, window, softcap: as in `attention`.
        splits: the number of parts, 1 to 64. None: chosen by shapes and device, never by the lengths, which would have
            to be read from the device. Results are bitwise reproducible for one number of parts.
        return_lse: also return the natural logarithm of the softmax's denominators.
        implementation: "auto" (CPU: C++, CUDA: Triton), or one of "cpu", "triton", "cuda", "reference". "cuda" takes
            bfloat16 and float16, D up to 128 and a multiple of 8, and 16-byte aligned rows of the caches.

    Returns:
        out [B, N, Hq, D], contiguous; with return_lse also lse, float32 [B, Hq, N]. For inference: no gradient.

    Raises:
        ValueError: shapes, dtypes, devices, strides or options do not fit; a tensor requires a gradient while one is
            recorded; or the implementation cannot run on the device. Within `dreamkernels.ops.debug.debug_checks()`
            also: a length is beyond the cache, or a page does not exist.
        RuntimeError: that, on CPU, always. On CUDA, without debug checks, the length is taken as that of the cache, and
            the keys and values of a page that does not exist as zeros.
    """
    _check_states(q, k_cache, v_cache, block_table is not None)
    _check_integers("cache_seqlens", cache_seqlens, q, f"[{q.shape[0]}]", tuple(cache_seqlens.shape) == (q.shape[0],))
    if block_table is not None:
        fits = block_table.dim() == 2 and block_table.shape[0] == q.shape[0]
        _check_integers("block_table", block_table, q, f"[{q.shape[0]}, max_pages]", fits)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    _check_options(scale, window, softcap, splits)
    if torch.is_grad_enabled() and (q.requires_grad or k_cache.requires_grad or v_cache.requires_grad):
        raise ValueError("decode_attention has no gradient, but a tensor requires one; call it under torch.no_grad()")
    if debug_enabled():
        _check_values(cache_seqlens, k_cache, block_table)
    chosen = choose(DECODE_ATTENTION.name, implementation, q.device.type)
    tensors = (q, k_cache, v_cache, cache_seqlens, block_table)
    mask = (causal, scale, window or -1, softcap or 0.0)
    if chosen == "reference":
        out, lse = reference.decode_attention(*tensors, *mask)
    else:
        out, lse = overload_for(DECODE_ATTENTION, chosen, needs_grad=False)(*tensors, *mask, splits or 0)
    return (out, lse) if return_lse else out
