"""GPU kernels of cross_conditioning.

All keys of a head are one tile, so nothing is carried from tile to tile:

    forward   program (picture, head, block):  q [POSITIONS, WIDTH], k and v [KEYS, WIDTH] -> out [POSITIONS, WIDTH]
    backward  program (condition, head, chunk): k and v stay, the chunk's blocks of positions pass by; the gradients of
              k and v stay in registers and are written once per chunk. A second kernel adds the chunks in order.

KEYS and WIDTH are powers of two not below 16; keys beyond the last count as minus infinity. The number of chunks is a
launch parameter of the architecture, so results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from dreamkernels.devices import architecture_of, launch_parameters, load_device
from dreamkernels.ops.launch import LAUNCH_OPTIONS, TRITON_DTYPES, ShippedKernel, on_device_of

LOG2_E = 1.4426950408889634

# Float32 products as three of TF32 on tensor cores, nearly exact; exact ones, on the CUDA cores, spill registers.
PRECISION: tl.constexpr = tl.constexpr("tf32x3")


@triton.jit
def _weights(q, k, keys, log2_scale, KEYS: tl.constexpr):
    """softmax(scale q k^T) over the keys, float32 [POSITIONS, KEYS]."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * log2_scale
    logits = tl.where((tl.arange(0, KEYS) < keys)[None, :], logits, float("-inf"))
    exponentials = tl.exp2(logits - tl.max(logits, axis=1)[:, None])
    return exponentials / tl.sum(exponentials, axis=1)[:, None]


@triton.jit
def _tile(base, first, count, stride, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < count)[:, None] & (column < width)[None, :]
    return tl.load(base + row.to(tl.int64)[:, None] * stride + column[None, :], inside, other=0.0)


@triton.jit
def _store_tile(base, tile, first, count, stride, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < count)[:, None] & (column < width)[None, :]
    tl.store(base + row.to(tl.int64)[:, None] * stride + column[None, :], tile.to(base.dtype.element_ty), inside)


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    out,
    q_outer,
    q_row,
    q_head,
    k_outer,
    k_row,
    k_head,
    v_outer,
    v_row,
    v_head,
    pictures_per_condition,
    positions,
    heads,
    keys,
    width,
    log2_scale,
    POSITIONS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    blocks = tl.cdiv(positions, POSITIONS)
    first = tl.program_id(0) % blocks * POSITIONS
    pair = tl.program_id(0) // blocks
    head = (pair % heads).to(tl.int64)
    picture = (pair // heads).to(tl.int64)
    condition = picture // pictures_per_condition
    queries = _tile(q + picture * q_outer + head * q_head, first, positions, q_row, width, POSITIONS, WIDTH)
    keys_tile = _tile(k + condition * k_outer + head * k_head, 0, keys, k_row, width, KEYS, WIDTH)
    values = _tile(v + condition * v_outer + head * v_head, 0, keys, v_row, width, KEYS, WIDTH)
    weights = _weights(queries, keys_tile, keys, log2_scale, KEYS)
    result = tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
    row = heads * width
    base = out + picture * positions * row + head * width
    _store_tile(base, result, first, positions, row, width, POSITIONS, WIDTH)


@triton.jit
def backward_kernel(
    grad_out,
    q,
    k,
    v,
    grad_q,
    kv_sums,
    grad_outer,
    grad_row,
    grad_head,
    q_outer,
    q_row,
    q_head,
    k_outer,
    k_row,
    k_head,
    v_outer,
    v_row,
    v_head,
    pictures_per_condition,
    positions,
    heads,
    keys,
    width,
    chunks,
    blocks_per_chunk,
    log2_scale,
    scale,
    Q_GRAD: tl.constexpr,
    KV_GRAD: tl.constexpr,
    POSITIONS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    chunk = tl.program_id(0) % chunks
    pair = tl.program_id(0) // chunks
    head = (pair % heads).to(tl.int64)
    condition = (pair // heads).to(tl.int64)
    keys_tile = _tile(k + condition * k_outer + head * k_head, 0, keys, k_row, width, KEYS, WIDTH)
    values = _tile(v + condition * v_outer + head * v_head, 0, keys, v_row, width, KEYS, WIDTH)
    row = heads * width
    blocks = tl.cdiv(positions, POSITIONS)
    begin = chunk * blocks_per_chunk
    end = tl.minimum(begin + blocks_per_chunk, pictures_per_condition * blocks)
    if KV_GRAD:
        grad_k = tl.zeros([KEYS, WIDTH], tl.float32)
        grad_v = tl.zeros([KEYS, WIDTH], tl.float32)
    for block in range(begin, end):
        picture = condition * pictures_per_condition + block // blocks
        first = block % blocks * POSITIONS
        queries = _tile(q + picture * q_outer + head * q_head, first, positions, q_row, width, POSITIONS, WIDTH)
        grads = _tile(
            grad_out + picture * grad_outer + head * grad_head, first, positions, grad_row, width, POSITIONS, WIDTH
        )
        weights = _weights(queries, keys_tile, keys, log2_scale, KEYS)
        if KV_GRAD:
            grad_v += tl.dot(tl.trans(weights.to(grads.dtype)), grads, input_precision=PRECISION)
        grad_weights = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        delta = tl.sum(weights * grad_weights, axis=1)
        grad_logits = (weights * (grad_weights - delta[:, None]) * scale).to(queries.dtype)
        if KV_GRAD:
            grad_k += tl.dot(tl.trans(grad_logits), queries, input_precision=PRECISION)
        if Q_GRAD:
            result = tl.dot(grad_logits, keys_tile, input_precision=PRECISION)
            base = grad_q + picture * positions * row + head * width
            _store_tile(base, result, first, positions, row, width, POSITIONS, WIDTH)
    if KV_GRAD:
        sums = kv_sums + tl.program_id(0).to(tl.int64) * 2 * keys * width
        _store_tile(sums, grad_k, 0, keys, width, width, KEYS, WIDTH)
        _store_tile(sums + keys * width, grad_v, 0, keys, width, width, KEYS, WIDTH)


@triton.jit
def reduce_kernel(kv_sums, grad_k, grad_v, heads, keys, width, chunks, BLOCK: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64)
    size = keys * width
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total_k = tl.zeros([BLOCK], tl.float32)
    total_v = tl.zeros([BLOCK], tl.float32)
    for chunk in range(chunks):
        sums = kv_sums + (pair * chunks + chunk) * 2 * size
        total_k += tl.load(sums + at, inside, other=0.0)
        total_v += tl.load(sums + size + at, inside, other=0.0)
    to = (pair // heads * keys + at // width) * heads * width + pair % heads * width + at % width
    tl.store(grad_k + to, total_k.to(grad_k.dtype.element_ty), inside)
    tl.store(grad_v + to, total_v.to(grad_v.dtype.element_ty), inside)


def _kernel_name(kernel: str, dtype: torch.dtype) -> str:
    return f"cross_conditioning_{kernel}" + ("_float32" if dtype == torch.float32 else "")


def _dense_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _launch(kernel: str, q: torch.Tensor, keys: int) -> tuple[dict[str, int], int, int]:
    """Launch parameters, KEYS and WIDTH. Raises ValueError when no registers or shared memory hold so large a head."""
    key_block, width_block = (max(16, triton.next_power_of_2(size)) for size in (keys, q.shape[3]))
    name = _kernel_name(kernel, q.dtype)
    architecture = architecture_of(q.device)
    most = load_device(architecture).launch[name][-1]["max_width"]
    if key_block * width_block > most:
        raise ValueError(
            f"{keys} keys of width {q.shape[3]} in {q.dtype} are not supported by {name} on {architecture} (their "
            f"product, each rounded up to a power of two, is {key_block * width_block}; at most {most}); "
            'use bfloat16 or choose implementation="reference"'
        )
    return launch_parameters(architecture, name, key_block * width_block), key_block, width_block


def cross_conditioning(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    q, k, v = _dense_rows(q), _dense_rows(k), _dense_rows(v)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if q.numel() == 0:
        return out
    pictures, positions, heads, width = q.shape
    conditions, keys = k.shape[:2]
    launch, key_block, width_block = _launch("forward", q, keys)
    block = launch["block_positions"]
    with on_device_of(q):
        forward_kernel[(pictures * heads * triton.cdiv(positions, block),)](
            q,
            k,
            v,
            out,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            pictures // conditions,
            positions,
            heads,
            keys,
            width,
            scale * LOG2_E,
            POSITIONS=block,
            KEYS=key_block,
            WIDTH=width_block,
            num_warps=launch["num_warps"],
            **LAUNCH_OPTIONS,
        )
    return out


def cross_conditioning_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    q_grad: bool,
    kv_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_out, q, k, v = (_dense_rows(x) for x in (grad_out, q, k, v))
    grad_q, grad_k, grad_v = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else x.new_empty(0)
        for x, wanted in ((q, q_grad), (k, kv_grad), (v, kv_grad))
    )
    if q.numel() == 0:
        return grad_q, grad_k.zero_(), grad_v.zero_()
    pictures, positions, heads, width = q.shape
    conditions, keys = k.shape[:2]
    launch, key_block, width_block = _launch("backward", q, keys)
    block = launch["block_positions"]
    blocks = pictures // conditions * triton.cdiv(positions, block)
    per_chunk = triton.cdiv(blocks, min(blocks, triton.cdiv(launch["programs"], conditions * heads)))
    chunks = triton.cdiv(blocks, per_chunk)
    programs = conditions * heads * chunks
    kv_sums = q.new_empty(programs * 2 * keys * width if kv_grad else 0, dtype=torch.float32)
    always_q = q.dtype == torch.float32  # without this gradient the compiler spills registers on sm_80
    written_q = torch.empty_like(q, memory_format=torch.contiguous_format) if always_q and not q_grad else grad_q
    with on_device_of(q):
        backward_kernel[(programs,)](
            grad_out,
            q,
            k,
            v,
            written_q,
            kv_sums,
            *grad_out.stride()[:3],
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            pictures // conditions,
            positions,
            heads,
            keys,
            width,
            chunks,
            per_chunk,
            scale * LOG2_E,
            scale,
            Q_GRAD=q_grad or always_q,
            KV_GRAD=kv_grad,
            POSITIONS=block,
            KEYS=key_block,
            WIDTH=width_block,
            num_warps=launch["num_warps"],
            **LAUNCH_OPTIONS,
        )
        if kv_grad:
            reduce = launch_parameters(architecture_of(q.device), "cross_conditioning_reduce", width)
            columns = reduce["block_elements"]
            reduce_kernel[(conditions * heads, triton.cdiv(keys * width, columns))](
                kv_sums,
                grad_k,
                grad_v,
                heads,
                keys,
                width,
                chunks,
                BLOCK=columns,
                num_warps=reduce["num_warps"],
                **LAUNCH_OPTIONS,
            )
    return grad_q, grad_k, grad_v


_STRIDES = {name: tuple(f"{name}_{part}" for part in ("outer", "row", "head")) for name in ("grad", "q", "k", "v")}
# Keys and widths that ship, by the area of their tile: 64 dream queries or 77 text tokens, heads of 64 or (SD 1.5) 160.
_SHIPPED_TILES = {4096: (64, 64), 8192: (128, 64), 16384: (64, 256)}


def _shipped(kernel: str, dtype: torch.dtype, entry: dict[str, int], gradients: tuple[bool, bool]) -> ShippedKernel:
    element = f"*{TRITON_DTYPES[dtype]}"
    keys, width = _SHIPPED_TILES[entry["max_width"]]
    forward = kernel == "forward"
    tensors = ("q", "k", "v", "out") if forward else ("grad_out", "q", "k", "v", "grad_q")
    strides = [
        name for tensor in (("q", "k", "v") if forward else ("grad", "q", "k", "v")) for name in _STRIDES[tensor]
    ]
    counts = ["pictures_per_condition", "positions", "heads", "keys", "width"]
    signature = dict.fromkeys(tensors, element)
    constants: dict[str, object] = {}
    if forward:
        signature |= dict.fromkeys([*strides, *counts], "i32") | {"log2_scale": "fp32"}
    else:
        signature["kv_sums"] = "*fp32"
        signature |= dict.fromkeys([*strides, *counts, "chunks", "blocks_per_chunk"], "i32")
        signature |= {"log2_scale": "fp32", "scale": "fp32"}
        constants = {"Q_GRAD": gradients[0], "KV_GRAD": gradients[1]}
    return ShippedKernel(
        operator="cross_conditioning" if forward else "cross_conditioning_backward",
        kernel=forward_kernel if forward else backward_kernel,
        dtype=dtype,
        width=entry["max_width"],
        signature=signature,
        constants={**constants, "POSITIONS": entry["block_positions"], "KEYS": keys, "WIDTH": width},
        num_warps=entry["num_warps"],
        divisible_by_16=(*strides, "width"),
    )


def shipped_kernels(architecture: str) -> Iterator[ShippedKernel]:
    """Every kernel at every launch parameter of an architecture, for the tiles of keys that models have."""
    table = load_device(architecture).launch
    for dtype, element in TRITON_DTYPES.items():
        for entry in table[_kernel_name("forward", dtype)]:
            yield _shipped("forward", dtype, entry, (False, False))
        for entry in table[_kernel_name("backward", dtype)]:
            for gradients in ((True, True), (True, False)) + (((False, True),) if dtype != torch.float32 else ()):
                yield _shipped("backward", dtype, entry, gradients)
        for entry in table["cross_conditioning_reduce"]:
            yield ShippedKernel(
                operator="cross_conditioning_backward",
                kernel=reduce_kernel,
                dtype=dtype,
                width=entry["max_width"],
                signature={
                    "kv_sums": "*fp32",
                    "grad_k": f"*{element}",
                    "grad_v": f"*{element}",
                    **dict.fromkeys(("heads", "keys", "width", "chunks"), "i32"),
                },
                constants={"BLOCK": entry["block_elements"]},
                num_warps=entry["num_warps"],
                divisible_by_16=("width",),
            )
