"""GPU kernels of decode_attention: one program attends with a tile of rows to one part of the keys; a second joins
the parts in their order.

The rows of a tile are all queries that share a head of the cache: row r is query r // group of head
kv_head * group + r % group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from dreamkernels.devices import architecture_of, launch_parameters, load_device
from dreamkernels.ops.launch import LAUNCH_OPTIONS, TRITON_DTYPES, ShippedKernel, on_device_of

_MAX_SPLITS = 64


@triton.jit
def _tanh(x):
    """1 - 2 / (e^2x + 1); nearer to zero, where that would cancel, x - x^3 p(x^2)."""
    log2e: tl.constexpr = 1.4426950408889634
    far = 1.0 - 2.0 / (tl.exp2(2.0 * log2e * x) + 1.0)
    square = x * x
    p = 0.006205946672707796 * square - 0.02102552354335785
    p = p * square + 0.05384168401360512
    p = p * square - 0.13332490622997284
    p = p * square + 0.33333316445350647
    return tl.where(square < 0.3125, x - x * square * p, far)


@triton.jit
def split_kernel(
    q,
    k_cache,
    v_cache,
    out,
    lse,
    cache_seqlens,
    block_table,
    tokens,
    q_heads,
    kv_heads,
    group,
    width,
    page_size,
    pages,
    pages_per_sequence,
    splits,
    window,
    q_sequence,
    q_token,
    q_head,
    k_page,
    k_position,
    k_head,
    v_page,
    v_position,
    v_head,
    out_part,
    lse_part,
    scale,
    softcap,
    PAGED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    split = tl.program_id(0)
    sequence = (tl.program_id(2) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(2) % kv_heads
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token = row // group
    head = kv_head * group + row % group
    channel = tl.arange(0, WIDTH)
    row_inside = token < tokens
    inside = row_inside[:, None] & (channel < width)[None, :]
    from_q = q + sequence * q_sequence + token.to(tl.int64) * q_token + head.to(tl.int64) * q_head
    queries = tl.load(from_q[:, None] + channel[None, :], inside, other=0.0)

    # The keys that this tile sees, and this program's part of them in whole tiles.
    capacity = page_size * pages_per_sequence
    length = tl.minimum(tl.maximum(tl.load(cache_seqlens + sequence), 0), capacity)
    position = length - tokens + token
    first = length - tokens + tl.program_id(1) * ROWS // group
    last = length - tokens + tl.minimum((tl.program_id(1) * ROWS + ROWS - 1) // group, tokens - 1)
    begin = 0
    end = length
    if WINDOW:
        begin = tl.maximum(first - window + 1, 0)
        end = tl.minimum(length, last + window)
    if CAUSAL:
        end = tl.minimum(length, last + 1)
    first_tile = begin // KEYS
    tiles = tl.cdiv(end, KEYS) - first_tile
    each = tl.cdiv(tl.maximum(tiles, 0), splits)
    first_tile += split * each
    last_tile = tl.minimum(first_tile + each, tl.cdiv(end, KEYS))

    log2e: tl.constexpr = 1.4426950408889634
    maximum = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for tile in range(first_tile, last_tile):
        key = tile * KEYS + tl.arange(0, KEYS)
        key_inside = key < end
        page = sequence + tl.zeros([KEYS], tl.int64)
        slot = key.to(tl.int64)
        if PAGED:
            entry = block_table + sequence * pages_per_sequence + key // page_size
            page = tl.load(entry, key_inside, other=-1).to(tl.int64)
            slot = (key % page_size).to(tl.int64)
            key_inside = key_inside & (page >= 0) & (page < pages)
        tile_inside = key_inside[:, None] & (channel < width)[None, :]
        from_k = k_cache + page * k_page + slot * k_position + kv_head.to(tl.int64) * k_head
        from_v = v_cache + page * v_page + slot * v_position + kv_head.to(tl.int64) * v_head
        keys = tl.load(from_k[:, None] + channel[None, :], tile_inside, other=0.0)
        values = tl.load(from_v[:, None] + channel[None, :], tile_inside, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        if SOFTCAP:
            scores = softcap * _tanh(scores / softcap)
        visible = (key < end)[None, :] & row_inside[:, None]
        if CAUSAL:
            visible = visible & (key[None, :] <= position[:, None])
        if WINDOW:
            distance = key[None, :] - position[:, None]
            visible = visible & (distance > -window) & (distance < window)
        scores = tl.where(visible, scores * log2e, -float("inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        base = tl.where(new_maximum == -float("inf"), 0.0, new_maximum)
        probabilities = tl.exp2(scores - base[:, None])
        adjust = tl.exp2(maximum - base)
        total = total * adjust + tl.sum(probabilities, axis=1)
        sums = sums * adjust[:, None]
        sums = tl.dot(probabilities.to(values.dtype), values, sums, input_precision="ieee")
        maximum = new_maximum

    sees_a_key = total > 0.0
    total = tl.where(sees_a_key, total, 1.0)
    result = (sums / total[:, None]).to(out.dtype.element_ty)
    row_lse = tl.where(sees_a_key, (maximum + tl.log2(total)) / log2e, -float("inf"))
    out_row = (sequence * tokens + token) * q_heads + head
    to_out = out + split.to(tl.int64) * out_part + out_row * width
    tl.store(to_out[:, None] + channel[None, :], result, inside)
    to_lse = lse + split.to(tl.int64) * lse_part + (sequence * q_heads + head) * tokens + token
    tl.store(to_lse, row_lse, row_inside)


@triton.jit
def combine_kernel(
    partial_out,
    partial_lse,
    out,
    lse,
    tokens,
    q_heads,
    width,
    splits,
    out_part,
    lse_part,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # (sequence, token, head)
    head = row % q_heads
    token = row // q_heads % tokens
    sequence = row // q_heads // tokens
    at = (sequence * q_heads + head) * tokens + token
    split = tl.arange(0, SPLITS)
    parts = tl.load(partial_lse + split.to(tl.int64) * lse_part + at, split < splits, other=-float("inf"))
    log2e: tl.constexpr = 1.4426950408889634
    maximum = tl.max(parts, axis=0)
    base = tl.where(maximum == -float("inf"), 0.0, maximum)
    factors = tl.exp2((parts - base) * log2e)
    total = tl.sum(factors, axis=0)
    sees_a_key = total > 0.0
    divisor = tl.where(sees_a_key, total, 1.0)
    tl.store(lse + at, tl.where(sees_a_key, base + tl.log2(divisor) / log2e, -float("inf")))
    channel = tl.arange(0, WIDTH)
    inside = (split < splits)[:, None] & (channel < width)[None, :]
    values = tl.load(
        partial_out + split[:, None].to(tl.int64) * out_part + row * width + channel[None, :], inside, other=0.0
    )
    result = tl.sum(values * (factors / divisor)[:, None], axis=0)
    tl.store(out + row * width + channel, result.to(out.dtype.element_ty), channel < width)


def _block_width(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _rows_per_program(rows: int, dtype: torch.dtype, wide_rows: int) -> int:
    """Few rows fit the smallest tile; float32, which has no tensor cores at full precision, always takes that."""
    return 16 if rows <= 16 or dtype == torch.float32 else wide_rows


def _keys_per_tile(launch: dict[str, int], dtype: torch.dtype) -> int:
    return launch["float32_block_keys" if dtype == torch.float32 else "block_keys"]


def choose_splits(blocks: int, capacity: int, tile: int, multiprocessors: int) -> int:
    """As in csrc/decode_attention/job.h: two blocks per multiprocessor, at least two tiles of a full cache each."""
    return max(1, min(-(-2 * multiprocessors // max(1, blocks)), capacity // (2 * tile), _MAX_SPLITS))


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None,
    causal: bool,
    scale: float,
    window: int,
    softcap: float,
    splits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, tokens, q_heads, width = q.shape
    kv_heads = k_cache.shape[2]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((batch, q_heads, tokens), dtype=torch.float32)
    if not q.numel():
        return out, lse
    q = q if q.stride(3) == 1 else q.contiguous()
    architecture = architecture_of(q.device)
    launch = launch_parameters(architecture, "decode_attention", width)
    group = q_heads // kv_heads
    rows = _rows_per_program(tokens * group, q.dtype, launch["block_rows"])
    tiles = triton.cdiv(tokens * group, rows)
    keys = _keys_per_tile(launch, q.dtype)
    pages_per_sequence = 1 if block_table is None else block_table.shape[1]
    if not splits:
        multiprocessors = int(load_device(architecture).limits["multiprocessors"])
        capacity = k_cache.shape[1] * pages_per_sequence
        splits = choose_splits(batch * kv_heads * tiles, capacity, keys, multiprocessors)
    parts = (out, lse)
    if splits > 1:
        parts = (q.new_empty((splits, *out.shape), dtype=torch.float32), lse.new_empty((splits, *lse.shape)))
    with on_device_of(q):
        split_kernel[(splits, tiles, batch * kv_heads)](
            q,
            k_cache,
            v_cache,
            *parts,
            cache_seqlens.contiguous(),
            cache_seqlens if block_table is None else block_table.contiguous(),
            tokens,
            q_heads,
            kv_heads,
            group,
            width,
            k_cache.shape[1],
            k_cache.shape[0],
            pages_per_sequence,
            splits,
            window,
            *q.stride()[:3],
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            out.numel(),
            lse.numel(),
            scale,
            softcap,
            PAGED=block_table is not None,
            CAUSAL=causal,
            WINDOW=window >= 0,
            SOFTCAP=softcap > 0,
            ROWS=rows,
            KEYS=keys,
            WIDTH=_block_width(width),
            num_warps=launch["num_warps"],
            **LAUNCH_OPTIONS,
        )
        if splits > 1:
            combine_kernel[(batch * tokens * q_heads,)](
                *parts,
                out,
                lse,
                tokens,
                q_heads,
                width,
                splits,
                out.numel(),
                lse.numel(),
                SPLITS=triton.next_power_of_2(splits),
                WIDTH=_block_width(width),
                num_warps=1,
                **LAUNCH_OPTIONS,
            )
    return out, lse


_STRIDES = tuple(f"{tensor}_{part}" for tensor in "kv" for part in ("page", "position", "head"))
_STRIDES += ("q_sequence", "q_token", "q_head")


def _shipped_split(dtype: torch.dtype, entry: dict[str, int], rows: int, **mask: bool) -> ShippedKernel:
    signature: dict[str, Any] = dict.fromkeys(("q", "k_cache", "v_cache"), f"*{TRITON_DTYPES[dtype]}")
    signature |= {"out": "*fp32", "lse": "*fp32", "cache_seqlens": "*i32", "block_table": "*i32"}
    integers = split_kernel.arg_names[7:28]
    signature |= dict.fromkeys(integers, "i32") | {"scale": "fp32", "softcap": "fp32"}
    return ShippedKernel(
        operator="decode_attention",
        kernel=split_kernel,
        dtype=dtype,
        width=entry["max_width"],
        signature=signature,
        constants={
            **mask,
            "ROWS": rows,
            "KEYS": _keys_per_tile(entry, dtype),
            "WIDTH": _block_width(entry["max_width"]),
        },
        num_warps=entry["num_warps"],
        divisible_by_16=("width", "page_size", *_STRIDES),
    )


def shipped_kernels(architecture: str) -> Iterator[ShippedKernel]:
    """Both kernels at every launch parameter: plain causal decoding, and with everything at once; 16 parts."""
    plain = {"PAGED": False, "CAUSAL": True, "WINDOW": False, "SOFTCAP": False}
    full = dict.fromkeys(plain, True)
    for dtype, element in TRITON_DTYPES.items():
        for entry in load_device(architecture).launch["decode_attention"]:
            for rows in sorted({_rows_per_program(count, dtype, entry["block_rows"]) for count in (1, 66)}):
                yield _shipped_split(dtype, entry, rows, **plain)
                yield _shipped_split(dtype, entry, rows, **full)
            signature = {"partial_out": "*fp32", "partial_lse": "*fp32", "out": f"*{element}", "lse": "*fp32"}
            signature |= dict.fromkeys(combine_kernel.arg_names[4:10], "i32")
            yield ShippedKernel(
                operator="decode_attention",
                kernel=combine_kernel,
                dtype=dtype,
                width=entry["max_width"],
                signature=signature,
                constants={"SPLITS": 16, "WIDTH": _block_width(entry["max_width"])},
                num_warps=1,
                divisible_by_16=("width", "out_part"),
            )
