"""GPU kernel of rotary, forward, backward and in place.

One program turns a tile of one sequence, of the queries or of the keys, with one reading of the tables:

    program (p, g):  heads [g * HEADS, (g + 1) * HEADS) of queries, then of keys
                     x tokens [tile * TOKENS, (tile + 1) * TOKENS) of sequence p // tiles, tile = p % tiles
                     x channels [0, HALF) and their partners `half` further on, HALF = half rounded up to a power of two
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from dreamkernels.devices import architecture_of, launch_parameters, load_device
from dreamkernels.ops.launch import LAUNCH_OPTIONS, TRITON_DTYPES, ShippedKernel, on_device_of
from dreamkernels.ops.rotary.layout import empty_in_memory_order_of


@triton.jit
def rotate_tile(
    x,
    y,
    cos,
    sin,
    cos_at,
    sin_at,
    sequence,
    token,
    head,
    tokens,
    heads,
    x_batch,
    x_token,
    x_head,
    y_batch,
    y_token,
    y_head,
    half,
    width,
    TRANSPOSED: tl.constexpr,
    COPY: tl.constexpr,
    HALF: tl.constexpr,
):
    column = tl.arange(0, HALF)
    in_table = (token < tokens)[:, None] & (column < half)[None, :]
    cos_at = cos_at[:, None] + column[None, :]
    sin_at = sin_at[:, None] + column[None, :]
    cos_first = tl.load(cos + cos_at, in_table, other=0.0).to(tl.float32)
    cos_second = tl.load(cos + half + cos_at, in_table, other=0.0).to(tl.float32)
    sin_first = tl.load(sin + sin_at, in_table, other=0.0).to(tl.float32)
    sin_second = tl.load(sin + half + sin_at, in_table, other=0.0).to(tl.float32)
    if TRANSPOSED:
        to_first, to_second = sin_second, -sin_first
    else:
        to_first, to_second = -sin_first, sin_second
    inside = (head < heads)[:, None, None] & in_table[None, :, :]
    x_row = sequence * x_batch + head[:, None, None] * x_head + token[None, :, None] * x_token
    y_row = sequence * y_batch + head[:, None, None] * y_head + token[None, :, None] * y_token
    x_at = x_row + column[None, None, :]
    y_at = y_row + column[None, None, :]
    first = tl.load(x + x_at, inside, other=0.0).to(tl.float32)
    second = tl.load(x + half + x_at, inside, other=0.0).to(tl.float32)
    new_first = first * cos_first[None, :, :] + second * to_first[None, :, :]
    new_second = second * cos_second[None, :, :] + first * to_second[None, :, :]
    tl.store(y + y_at, new_first.to(y.dtype.element_ty), inside)
    tl.store(y + half + y_at, new_second.to(y.dtype.element_ty), inside)
    if COPY:  # channels that do not turn
        rows_inside = (head < heads)[:, None, None] & (token < tokens)[None, :, None]
        for start in range(2 * half, width, HALF):
            kept = start + column
            kept_inside = rows_inside & (kept < width)[None, None, :]
            values = tl.load(x + x_row + kept[None, None, :], kept_inside, other=0.0)
            tl.store(y + y_row + kept[None, None, :], values, kept_inside)


@triton.jit
def rotary_kernel(
    q,
    k,
    new_q,
    new_k,
    cos,
    sin,
    position_ids,
    tokens,
    tiles,
    q_heads,
    k_heads,
    rows,
    half,
    width,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    new_q_batch,
    new_q_token,
    new_q_head,
    new_k_batch,
    new_k_token,
    new_k_head,
    cos_batch,
    cos_row,
    sin_batch,
    sin_row,
    position_batch,
    position_token,
    POSITIONS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    COPY: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    HALF: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    sequence = program // tiles
    token = (program % tiles) * TOKENS + tl.arange(0, TOKENS)
    if POSITIONS:
        at = sequence * position_batch + token * position_token
        row = tl.load(position_ids + at, token < tokens, other=0).to(tl.int64)
        row = tl.minimum(tl.maximum(row, 0), rows - 1)  # never read outside the tables
        cos_at, sin_at = row * cos_row, row * sin_row
    else:
        cos_at = sequence * cos_batch + token * cos_row
        sin_at = sequence * sin_batch + token * sin_row
    group = tl.program_id(1).to(tl.int64)
    q_groups = (q_heads + HEADS - 1) // HEADS
    head = tl.arange(0, HEADS).to(tl.int64)
    if group < q_groups:
        rotate_tile(
            q, new_q, cos, sin, cos_at, sin_at, sequence, token, group * HEADS + head, tokens, q_heads,
            q_batch, q_token, q_head, new_q_batch, new_q_token, new_q_head, half, width, TRANSPOSED, COPY, HALF,
        )  # fmt: skip
    else:
        rotate_tile(
            k, new_k, cos, sin, cos_at, sin_at, sequence, token, (group - q_groups) * HEADS + head, tokens, k_heads,
            k_batch, k_token, k_head, new_k_batch, new_k_token, new_k_head, half, width, TRANSPOSED, COPY, HALF,
        )  # fmt: skip


def _strides(x: torch.Tensor, heads_first: bool) -> tuple[int, int, int]:
    """Of batch, token and head."""
    if x.dim() == 3:
        return 0, x.stride(0), x.stride(1)
    return (x.stride(0), x.stride(2), x.stride(1)) if heads_first else (x.stride(0), x.stride(1), x.stride(2))


def _with_adjacent_channels(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _table_strides(table: torch.Tensor) -> tuple[int, int]:
    return table.stride(0) if table.dim() == 3 and table.shape[0] > 1 else 0, table.stride(-2)


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    new_q: torch.Tensor,
    new_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None,
    heads_first: bool,
    transposed: bool,
) -> None:
    batch = 1 if q.dim() == 3 else q.shape[0]
    tokens_dim, heads_dim = (0, 1) if q.dim() == 3 else (2, 1) if heads_first else (1, 2)
    tokens, q_heads, k_heads = q.shape[tokens_dim], q.shape[heads_dim], k.shape[heads_dim]
    if not batch * tokens * (q_heads + k_heads):
        return
    q, k, cos, sin = (_with_adjacent_channels(t) for t in (q, k, cos, sin))
    rotated, width = cos.shape[-1], q.shape[-1]
    launch = launch_parameters(architecture_of(q.device), "rotary", rotated)
    tiles = triton.cdiv(tokens, launch["tokens"])
    groups = triton.cdiv(q_heads, launch["heads"]) + triton.cdiv(k_heads, launch["heads"])
    if position_ids is None:
        position_strides = (0, 0)
    else:
        shared = position_ids.dim() == 1 or position_ids.shape[0] == 1
        position_strides = (0 if shared else position_ids.stride(0), position_ids.stride(-1))
    with on_device_of(q):
        rotary_kernel[(batch * tiles, groups)](
            q,
            k,
            new_q,
            new_k,
            cos,
            sin,
            cos if position_ids is None else position_ids,
            tokens,
            tiles,
            q_heads,
            k_heads,
            cos.shape[0],
            rotated // 2,
            width,
            *_strides(q, heads_first),
            *_strides(k, heads_first),
            *_strides(new_q, heads_first),
            *_strides(new_k, heads_first),
            *_table_strides(cos),
            *_table_strides(sin),
            *position_strides,
            POSITIONS=position_ids is not None,
            TRANSPOSED=transposed,
            COPY=rotated < width and new_q.data_ptr() != q.data_ptr(),
            HEADS=launch["heads"],
            TOKENS=launch["tokens"],
            HALF=triton.next_power_of_2(rotated // 2),
            num_warps=launch["num_warps"],
            **LAUNCH_OPTIONS,
        )


def rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None,
    heads_first: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    new_q, new_k = empty_in_memory_order_of(q), empty_in_memory_order_of(k)
    _launch(q, k, new_q, new_k, cos, sin, position_ids, heads_first, transposed=False)
    return new_q, new_k


def rotary_backward(
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None,
    heads_first: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    new_q, new_k = empty_in_memory_order_of(grad_q), empty_in_memory_order_of(grad_k)
    _launch(grad_q, grad_k, new_q, new_k, cos, sin, position_ids, heads_first, transposed=True)
    return new_q, new_k


def rotary_(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None,
    heads_first: bool,
) -> None:
    _launch(q, k, q, k, cos, sin, position_ids, heads_first, transposed=False)


_STATE_STRIDES = tuple(f"{x}_{d}" for x in ("q", "k", "new_q", "new_k") for d in ("batch", "token", "head"))
_TABLE_STRIDES = ("cos_batch", "cos_row", "sin_batch", "sin_row")


def _shipped(
    dtype: torch.dtype, table: torch.dtype, entry: dict[str, int], positions: bool, transposed: bool, copy: bool
) -> ShippedKernel:
    signature = dict.fromkeys(("q", "k", "new_q", "new_k"), f"*{TRITON_DTYPES[dtype]}")
    signature |= dict.fromkeys(("cos", "sin"), f"*{TRITON_DTYPES[table]}")
    signature["position_ids"] = "*i64" if positions else signature["cos"]
    counts = ("tokens", "tiles", "q_heads", "k_heads", "rows", "half", "width")
    signature |= dict.fromkeys((*counts, *_STATE_STRIDES, *_TABLE_STRIDES, "position_batch", "position_token"), "i32")
    tile = {"HEADS": entry["heads"], "TOKENS": entry["tokens"], "HALF": entry["max_width"] // 2}
    return ShippedKernel(
        operator="rotary_backward" if transposed else "rotary",
        kernel=rotary_kernel,
        dtype=dtype,
        width=entry["max_width"],
        signature=signature,
        constants={"POSITIONS": positions, "TRANSPOSED": transposed, "COPY": copy, **tile},
        num_warps=entry["num_warps"],
        divisible_by_16=("half", "width", *_STATE_STRIDES, *_TABLE_STRIDES),
    )


def shipped_kernels(architecture: str) -> Iterator[ShippedKernel]:
    """Every kernel at every launch parameter of an architecture, at the widest rotation that each entry serves."""
    for dtype in TRITON_DTYPES:
        for entry in load_device(architecture).launch["rotary"]:
            for positions in (False, True):
                yield _shipped(dtype, dtype, entry, positions, transposed=False, copy=False)
            # The most that a call can ask for: wide tables, positions, and channels that do not turn.
            yield _shipped(dtype, torch.float32, entry, positions=True, transposed=True, copy=True)
