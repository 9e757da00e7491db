"""GPU kernel of append_kv: one program per token and tile of HEADS heads; query tiles first, then keys, then values.

The rotated channels of a head are held as two halves, which turn into each other, and the rest beside them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from dreamkernels.devices import architecture_of, launch_parameters, load_device
from dreamkernels.ops.launch import LAUNCH_OPTIONS, TRITON_DTYPES, ShippedKernel, on_device_of


@triton.jit
def _rotate_heads(
    x,
    y,
    weight,
    cos,
    sin,
    head,
    heads,
    x_head,
    y_head,
    half,
    width,
    eps,
    NORM: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    channel = tl.arange(0, HALF)
    inside = (head < heads)[:, None] & (channel < half)[None, :]
    from_first = head[:, None].to(tl.int64) * x_head + channel[None, :]
    to_first = head[:, None].to(tl.int64) * y_head + channel[None, :]
    first = tl.load(x + from_first, inside, other=0.0).to(tl.float32)
    second = tl.load(x + from_first + half, inside, other=0.0).to(tl.float32)
    if REST:
        kept_channel = 2 * half + tl.arange(0, REST)
        kept_inside = (head < heads)[:, None] & (kept_channel < width)[None, :]
        from_kept = head[:, None].to(tl.int64) * x_head + kept_channel[None, :]
        to_kept = head[:, None].to(tl.int64) * y_head + kept_channel[None, :]
        kept = tl.load(x + from_kept, kept_inside, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        if REST:
            squares += tl.sum(kept * kept, axis=1)
        rstd = tl.rsqrt(squares / width + eps)[:, None]
        kind = x.dtype.element_ty
        scale_first = tl.load(weight + channel, channel < half, other=0.0).to(tl.float32)[None, :]
        scale_second = tl.load(weight + half + channel, channel < half, other=0.0).to(tl.float32)[None, :]
        first = ((first * rstd).to(kind).to(tl.float32) * scale_first).to(kind).to(tl.float32)
        second = ((second * rstd).to(kind).to(tl.float32) * scale_second).to(kind).to(tl.float32)
        if REST:
            scale_kept = tl.load(weight + kept_channel, kept_channel < width, other=0.0).to(tl.float32)[None, :]
            kept = ((kept * rstd).to(kind).to(tl.float32) * scale_kept).to(kind).to(tl.float32)
    cos_first = tl.load(cos + channel, channel < half, other=0.0).to(tl.float32)[None, :]
    cos_second = tl.load(cos + half + channel, channel < half, other=0.0).to(tl.float32)[None, :]
    sin_first = tl.load(sin + channel, channel < half, other=0.0).to(tl.float32)[None, :]
    sin_second = tl.load(sin + half + channel, channel < half, other=0.0).to(tl.float32)[None, :]
    kind = y.dtype.element_ty
    tl.store(y + to_first, (first * cos_first - second * sin_first).to(kind), inside)
    tl.store(y + to_first + half, (second * cos_second + first * sin_second).to(kind), inside)
    if REST:
        tl.store(y + to_kept, kept.to(kind), kept_inside)


@triton.jit
def append_kernel(
    q,
    k,
    v,
    k_cache,
    v_cache,
    rotated_q,
    cache_seqlens,
    block_table,
    cos,
    sin,
    q_weight,
    k_weight,
    tokens,
    q_heads,
    kv_heads,
    width,
    half,
    positions,
    page_size,
    pages,
    pages_per_sequence,
    q_sequence,
    q_token,
    q_head,
    k_sequence,
    k_token,
    k_head,
    v_sequence,
    v_token,
    v_head,
    k_cache_page,
    k_cache_position,
    k_cache_head,
    v_cache_page,
    v_cache_position,
    v_cache_head,
    eps,
    PAGED: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    sequence = row // tokens
    token = row % tokens
    position = tl.load(cache_seqlens + sequence).to(tl.int64) + token
    nearest = tl.minimum(tl.maximum(position, 0), positions - 1)
    cos += nearest * 2 * half
    sin += nearest * 2 * half
    q_tiles = tl.cdiv(q_heads, HEADS)
    kv_tiles = tl.cdiv(kv_heads, HEADS)
    if tile < q_tiles:
        head = tile * HEADS + tl.arange(0, HEADS)
        from_q = q + sequence * q_sequence + token * q_token
        to_q = rotated_q + row * q_heads * width
        _rotate_heads(
            from_q, to_q, q_weight, cos, sin, head, q_heads, q_head, width, half, width, eps, Q_NORM, HALF, REST
        )
    else:
        # A position outside of the cache, or of a page that does not exist, is not written.
        held = (position >= 0) & (position < pages_per_sequence * page_size)
        page = sequence
        slot = position
        if PAGED:
            entry = block_table + sequence * pages_per_sequence + position // page_size
            page = tl.load(entry, held, other=-1).to(tl.int64)
            slot = position % page_size
        held = held & (page >= 0) & (page < pages)
        heads = tl.where(held, kv_heads, 0)
        if tile < q_tiles + kv_tiles:
            head = (tile - q_tiles) * HEADS + tl.arange(0, HEADS)
            from_k = k + sequence * k_sequence + token * k_token
            to_k = k_cache + page * k_cache_page + slot * k_cache_position
            _rotate_heads(
                from_k,
                to_k,
                k_weight,
                cos,
                sin,
                head,
                heads,
                k_head,
                k_cache_head,
                half,
                width,
                eps,
                K_NORM,
                HALF,
                REST,
            )
        else:
            value_head = ((tile - q_tiles - kv_tiles) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
            channel = tl.arange(0, WIDTH)
            inside = (value_head < heads)[:, None] & (channel < width)[None, :]
            from_v = v + sequence * v_sequence + token * v_token
            value = tl.load(from_v + value_head[:, None] * v_head + channel[None, :], inside)
            to_v = v_cache + page * v_cache_page + slot * v_cache_position
            tl.store(to_v + value_head[:, None] * v_cache_head + channel[None, :], value, inside)


def _shape_constants(width: int, rotated: int) -> dict[str, int]:
    """Powers of two that hold the halves, the channels that are not rotated (0: all are), and a whole head."""
    numbers = {"HALF": rotated // 2, "REST": width - rotated, "WIDTH": width}
    return {name: triton.next_power_of_2(value) if value else 0 for name, value in numbers.items()}


def append_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_norm_weight: torch.Tensor | None,
    k_norm_weight: torch.Tensor | None,
    eps: float,
    block_table: torch.Tensor | None,
) -> torch.Tensor:
    batch, tokens, q_heads, width = q.shape
    kv_heads, rotated = k.shape[2], cos.shape[1]
    rotated_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not batch * tokens * width * (q_heads + kv_heads):
        return rotated_q
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    launch = launch_parameters(architecture_of(q.device), "append_kv", width)
    heads = launch["heads_per_program"]
    tiles = triton.cdiv(q_heads, heads) + 2 * triton.cdiv(kv_heads, heads)
    with on_device_of(q):
        append_kernel[(batch * tokens, tiles)](
            q,
            k,
            v,
            k_cache,
            v_cache,
            rotated_q,
            cache_seqlens.contiguous(),
            cache_seqlens if block_table is None else block_table.contiguous(),
            cos.contiguous(),
            sin.contiguous(),
            q if q_norm_weight is None else q_norm_weight.contiguous(),
            k if k_norm_weight is None else k_norm_weight.contiguous(),
            tokens,
            q_heads,
            kv_heads,
            width,
            rotated // 2,
            cos.shape[0],
            k_cache.shape[1],
            k_cache.shape[0],
            1 if block_table is None else block_table.shape[1],
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            eps,
            PAGED=block_table is not None,
            Q_NORM=q_norm_weight is not None,
            K_NORM=k_norm_weight is not None,
            HEADS=heads,
            **_shape_constants(width, rotated),
            num_warps=launch["num_warps"],
            **LAUNCH_OPTIONS,
        )
    return rotated_q


_TENSORS = ("q", "k", "v", "k_cache", "v_cache", "rotated_q")
_STRIDES = tuple(name for name in append_kernel.arg_names if name.rpartition("_")[0] in _TENSORS)


def shipped_kernels(architecture: str) -> Iterator[ShippedKernel]:
    """The kernel at every launch parameter of an architecture: LLaMA's case (no norm) and Qwen3's (norm, paged)."""
    for dtype, element in TRITON_DTYPES.items():
        for entry in load_device(architecture).launch["append_kv"]:
            for extra in (False, True):
                integers = append_kernel.arg_names[12:36]
                signature = dict.fromkeys((*_TENSORS, "cos", "sin", "q_weight", "k_weight"), f"*{element}")
                signature |= dict.fromkeys(("cache_seqlens", "block_table"), "*i32")
                signature |= dict.fromkeys(integers, "i32") | {"eps": "fp32"}
                yield ShippedKernel(
                    operator="append_kv",
                    kernel=append_kernel,
                    dtype=dtype,
                    width=entry["max_width"],
                    signature=signature,
                    constants={
                        "PAGED": extra,
                        "Q_NORM": extra,
                        "K_NORM": extra,
                        "HEADS": entry["heads_per_program"],
                        **_shape_constants(entry["max_width"], entry["max_width"]),
                    },
                    num_warps=entry["num_warps"],
                    divisible_by_16=("width", "half", *_STRIDES),
                )
