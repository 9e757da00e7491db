"""append_kv: normalises, rotates and writes the keys and values of new tokens into a key-value cache."""

from __future__ import annotations

import torch

from dreamkernels.ops.append_kv import reference
from dreamkernels.ops.debug import check_range, debug_enabled
from dreamkernels.ops.operator import FLOAT_DTYPES, choose, define, overload_for, row_major_like

__all__ = ["append_kv"]


def _fake(q, k, v, k_cache, v_cache, cache_seqlens, cos, sin, q_norm_weight, k_norm_weight, eps, block_table):
    return row_major_like(q)


APPEND_KV = define(
    "append_kv",
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, Tensor cos, "
    "Tensor sin, Tensor? q_norm_weight, Tensor? k_norm_weight, float eps, Tensor? block_table) -> Tensor",
    fake=_fake,
    triton="dreamkernels.ops.append_kv.triton:append_kv",
    cuda=True,
)


def _check_states(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if q.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"q has dtype {q.dtype}, which append_kv does not support (float32, bfloat16, float16); cast it"
        )
    if q.dim() != 4 or k.dim() != 4 or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3] or v.shape != k.shape:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} must be [B, N, Hq, D], [B, N, Hk, D] and "
            "[B, N, Hk, D]"
        )
    for name, x in (("k", k), ("v", v)):
        _check_like_q(name, x, q)


def _check_like_q(name: str, x: torch.Tensor, q: torch.Tensor) -> None:
    if x.dtype != q.dtype or x.device != q.device:
        raise ValueError(f"{name} is {x.dtype} on {x.device} but q is {q.dtype} on {q.device}; cast or move it")


def _check_caches(k: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, paged: bool) -> None:
    batch, _, heads, width = k.shape
    first = "pages, page_size" if paged else f"{batch}, S"
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        fits = cache.dim() == 4 and tuple(cache.shape[2:]) == (heads, width) and (paged or cache.shape[0] == batch)
        if not fits or cache.shape != k_cache.shape:
            raise ValueError(
                f"{name} {list(cache.shape)} must be [{first}, {heads}, {width}] for k {list(k.shape)}, and both "
                "caches of one shape"
            )
        _check_like_q(name, cache, k)
        repeats = any(size > 1 and not stride for size, stride in zip(cache.shape, cache.stride(), strict=True))
        if repeats or (cache.shape[3] > 1 and cache.stride(3) != 1):
            raise ValueError(
                f"{name} with strides {list(cache.stride())} cannot be written in place: channels must be adjacent and "
                "elements distinct"
            )


def _check_integers(name: str, x: torch.Tensor, q: torch.Tensor, shape: str, fits: bool) -> None:
    if x.dtype != torch.int32 or not fits:
        raise ValueError(f"{name} {list(x.shape)} {x.dtype} must be int32 {shape} for q {list(q.shape)}")
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device} but q is on {q.device}; move it")


def _check_tables(q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    if cos.shape != sin.shape or cos.dtype != sin.dtype or cos.dim() != 2:
        raise ValueError(
            f"cos {list(cos.shape)} {cos.dtype} and sin {list(sin.shape)} {sin.dtype} must be [positions, R] both, of "
            "one dtype"
        )
    if cos.dtype not in (q.dtype, torch.float32):
        raise ValueError(f"cos and sin have dtype {cos.dtype}; with q {q.dtype} they must be {q.dtype} or float32")
    if cos.device != q.device or sin.device != q.device:
        raise ValueError(f"cos is on {cos.device} and sin on {sin.device} but q is on {q.device}; move them")
    if cos.shape[1] < 2 or cos.shape[1] % 2 or cos.shape[1] > q.shape[3]:
        raise ValueError(
            f"cos and sin have {cos.shape[1]} columns; they need an even number from 2 to the width of a head, "
            f"{q.shape[3]}"
        )


def _check_values(
    tokens: int, cache_seqlens: torch.Tensor, positions: int, k_cache: torch.Tensor, block_table: torch.Tensor | None
) -> None:
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    meaning = f"{tokens} new tokens, {capacity} positions in the cache, {positions} in cos and sin"
    check_range("append_kv", "cache_seqlens", cache_seqlens, 0, min(capacity, positions) - tokens + 1, meaning=meaning)
    if block_table is not None and tokens:
        ends = cache_seqlens.long()[:, None] + torch.tensor([0, tokens - 1], device=cache_seqlens.device)
        page = torch.arange(block_table.shape[1], device=block_table.device)
        first, last = (ends // k_cache.shape[1]).unbind(1)
        used = (page >= first[:, None]) & (page <= last[:, None])
        pages = torch.where(used, block_table, 0)
        check_range("append_kv", "block_table", pages, 0, k_cache.shape[0], meaning="the pages of the cache")


def append_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_norm_weight: torch.Tensor | None = None,
    k_norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    block_table: torch.Tensor | None = None,
    implementation: str = "auto",
) -> torch.Tensor:
    """Writes the keys and values of N new tokens per sequence into a cache, and returns the queries ready for it.

    Token n of sequence b has the position p = cache_seqlens[b] + n. Its query and key heads are normalised over their
    channels (`rms_norm`, where a weight is given, as in Qwen3; LLaMA has none), and rotated by p (`rotary`: channel i
    with channel i + R/2). The key and the value are written to position p of the cache. One launch for what otherwise
    are two norms, a rotation and two scatters.

    Args:
        q: [B, N, Hq, D], float32, bfloat16 or float16; N is 1 in ordinary decoding. Any strides between heads, such as
            those of slices of a joint query-key-value product; only where the channels are strided is it copied first.
        k, v: [B, N, Hk, D], as q.
        k_cache, v_cache: [B, S, Hk, D]; or, with a block_table, [pages, page_size, Hk, D]. Written in place; any
            strides with adjacent channels. Positions that are not written keep their values.
        cache_seqlens: int32 [B], the tokens in the cache before the call. It is not advanced: call once per layer, and
            add N after the last one.
        cos, sin: [positions, R], tables as `rotary_tables` makes them; R is even and at most D, channels from R on are
            not rotated. Dtype of q, or float32.
        q_norm_weight, k_norm_weight: [D], dtype of q, or None.
        eps: added to the mean square when normalising.
        block_table: int32 [B, max_pages]: position p of sequence b is slot p % page_size of page
            block_table[b, p // page_size]. Entries of pages that this call does not write are not read. A page that two
            written positions share is a mistake; which of them stays is unspecified.
        implementation: "auto" (CPU: C++, CUDA: Triton), or one of "cpu", "triton", "cuda", "reference".

    Returns:
        The normalised and rotated q, contiguous. For inference: there is no gradient.

    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit; a tensor requires a gradient while one is recorded;
            or the implementation cannot run on the device. Within `dreamkernels.ops.debug.debug_checks()` also: a
            position is beyond the cache or the tables, or a page does not exist.
        RuntimeError: that, on CPU, always; the cache is then unchanged. On CUDA, without debug checks, such a position
            is not written and turns as the nearest row of the tables, because checking would stop the host.
    """
    _check_states(q, k, v)
    _check_caches(k, k_cache, v_cache, block_table is not None)
    _check_integers("cache_seqlens", cache_seqlens, q, f"[{q.shape[0]}]", tuple(cache_seqlens.shape) == (q.shape[0],))
    _check_tables(q, cos, sin)
    for name, weight in (("q_norm_weight", q_norm_weight), ("k_norm_weight", k_norm_weight)):
        if weight is not None:
            if tuple(weight.shape) != (q.shape[3],):
                raise ValueError(f"{name} {list(weight.shape)} must be [{q.shape[3]}] for q {list(q.shape)}")
            _check_like_q(name, weight, q)
    if block_table is not None:
        fits = block_table.dim() == 2 and block_table.shape[0] == q.shape[0]
        _check_integers("block_table", block_table, q, f"[{q.shape[0]}, max_pages]", fits)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, k_cache, v_cache)):
        raise ValueError("append_kv has no gradient, but an argument requires one; call it under torch.no_grad()")
    if debug_enabled():
        _check_values(q.shape[1], cache_seqlens, cos.shape[0], k_cache, block_table)
    chosen = choose(APPEND_KV.name, implementation, q.device.type)
    arguments = (q, k, v, k_cache, v_cache, cache_seqlens, cos, sin, q_norm_weight, k_norm_weight, eps, block_table)
    if chosen == "reference":
        return reference.append_kv(*arguments)
    return overload_for(APPEND_KV, chosen, needs_grad=False)(*arguments)
