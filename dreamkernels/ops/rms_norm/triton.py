"""GPU kernels of rms_norm.

Forward: one program holds ROWS whole rows in registers, so a row is read once and written once.

    program p:  rows [p * ROWS, (p + 1) * ROWS) x columns [0, BLOCK), BLOCK = width rounded up to a power of two

Rows too wide for the registers of one program are walked over in blocks, twice (`*_wide_kernel`).

Backward: one program walks over a contiguous chunk of rows and keeps the weight gradient of its chunk in registers; a
second kernel adds the chunks in their order. The number of chunks is a launch parameter of the architecture, so
results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from dreamkernels.devices import architecture_of, launch_parameters, load_device
from dreamkernels.ops.launch import LAUNCH_OPTIONS, TRITON_DTYPES, ShippedKernel, on_device_of


@triton.jit
def forward_kernel(
    x,
    residual,
    weight,
    y,
    new_residual,
    rows,
    width,
    eps,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    h = tl.load(x + at, inside, other=0.0)
    if RESIDUAL:
        added = h.to(tl.float32) + tl.load(residual + at, inside, other=0.0).to(tl.float32)
        h = added.to(h.dtype)
        tl.store(new_residual + at, h, inside)
    wide = h.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, axis=1) / width + eps)
    normalised = (wide * rstd[:, None]).to(h.dtype).to(tl.float32)
    scale = tl.load(weight + column, column < width, other=0.0).to(tl.float32)
    tl.store(y + at, (normalised * scale[None, :]).to(h.dtype), inside)


@triton.jit
def forward_wide_kernel(x, residual, weight, y, new_residual, width, eps, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        h = tl.load(x + row + column, inside, other=0.0)
        if RESIDUAL:
            added = h.to(tl.float32) + tl.load(residual + row + column, inside, other=0.0).to(tl.float32)
            h = added.to(h.dtype)
            tl.store(new_residual + row + column, h, inside)
        wide = h.to(tl.float32)
        squares += wide * wide
    rstd = tl.rsqrt(tl.sum(squares, axis=0) / width + eps)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        h = tl.load(x + row + column, inside, other=0.0)
        if RESIDUAL:  # added once more: reading new_residual back would need a barrier
            added = h.to(tl.float32) + tl.load(residual + row + column, inside, other=0.0).to(tl.float32)
            h = added.to(h.dtype)
        normalised = (h.to(tl.float32) * rstd).to(h.dtype).to(tl.float32)
        scale = tl.load(weight + column, inside, other=0.0).to(tl.float32)
        tl.store(y + row + column, (normalised * scale).to(h.dtype), inside)


@triton.jit
def backward_kernel(
    grad_y,
    grad_residual,
    x,
    weight,
    grad_x,
    weight_sums,
    rows,
    rows_per_program,
    width,
    eps,
    RESIDUAL: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    scale = tl.load(weight + column, inside, other=0.0).to(tl.float32)
    if WEIGHT:
        weight_sum = tl.zeros([BLOCK], tl.float32)
    begin = program * rows_per_program
    end = tl.minimum(begin + rows_per_program, rows)
    for row in range(begin, end):
        at = row * width + column
        v = tl.load(x + at, inside, other=0.0).to(tl.float32)
        g = tl.load(grad_y + at, inside, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(v * v, axis=0) / width + eps)
        projection = tl.sum(g * scale * v, axis=0) / width * rstd * rstd * rstd
        grad = g * scale * rstd - v * projection
        if RESIDUAL:
            grad += tl.load(grad_residual + at, inside, other=0.0).to(tl.float32)
        tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), inside)
        if WEIGHT:
            weight_sum += g * v * rstd
    if WEIGHT:
        tl.store(weight_sums + program * width + column, weight_sum, inside)


@triton.jit
def backward_wide_kernel(
    grad_y,
    grad_residual,
    x,
    weight,
    grad_x,
    weight_sums,
    rows,
    rows_per_program,
    width,
    eps,
    RESIDUAL: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    begin = program * rows_per_program
    for row in range(begin, tl.minimum(begin + rows_per_program, rows)):
        squares = tl.zeros([BLOCK], tl.float32)
        products = tl.zeros([BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < width
            v = tl.load(x + row * width + column, inside, other=0.0).to(tl.float32)
            g = tl.load(grad_y + row * width + column, inside, other=0.0).to(tl.float32)
            squares += v * v
            products += g * tl.load(weight + column, inside, other=0.0).to(tl.float32) * v
        rstd = tl.rsqrt(tl.sum(squares, axis=0) / width + eps)
        projection = tl.sum(products, axis=0) / width * rstd * rstd * rstd
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < width
            at = row * width + column
            v = tl.load(x + at, inside, other=0.0).to(tl.float32)
            g = tl.load(grad_y + at, inside, other=0.0).to(tl.float32)
            grad = g * tl.load(weight + column, inside, other=0.0).to(tl.float32) * rstd - v * projection
            if RESIDUAL:
                grad += tl.load(grad_residual + at, inside, other=0.0).to(tl.float32)
            tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), inside)
            if WEIGHT:  # the running sum lives in memory here; the first row of the chunk starts it at zero
                running = weight_sums + program * width + column
                before = tl.load(running, column < tl.where(row > begin, width, 0), other=0.0)
                tl.store(running, before + g * v * rstd, inside)
        tl.debug_barrier()


@triton.jit
def reduce_kernel(weight_sums, grad_weight, chunks, width, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        inside = (chunk < chunks)[:, None] & (column < width)[None, :]
        total += tl.sum(tl.load(weight_sums + chunk[:, None] * width + column[None, :], inside, other=0.0), axis=0)
    tl.store(grad_weight + column, total.to(grad_weight.dtype.element_ty), column < width)


def _forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    new_residual = y if residual is None else torch.empty_like(x)
    width = weight.shape[0]
    if x.numel():
        rows = x.numel() // width
        launch = launch_parameters(architecture_of(x.device), "rms_norm_forward", width)
        added = x if residual is None else residual.contiguous()
        options = {"RESIDUAL": residual is not None, "num_warps": launch["num_warps"], **LAUNCH_OPTIONS}
        with on_device_of(x):
            if "block_columns" in launch:
                forward_wide_kernel[(rows,)](
                    x, added, weight, y, new_residual, width, eps, BLOCK=launch["block_columns"], **options
                )
            else:
                per_program = launch["rows_per_program"]
                block = triton.next_power_of_2(width)
                forward_kernel[(triton.cdiv(rows, per_program),)](
                    x, added, weight, y, new_residual, rows, width, eps, ROWS=per_program, BLOCK=block, **options
                )
    return y, new_residual


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _forward(x, None, weight, eps)[0]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _forward(x, residual, weight, eps)


def rms_norm_backward(
    grad_y: torch.Tensor,
    grad_residual: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    grad_y, x, weight = grad_y.contiguous(), x.contiguous(), weight.contiguous()
    width = weight.shape[0]
    grad_x = torch.empty_like(x)
    grad_weight = weight.new_empty(width if weight_grad else 0)
    if not x.numel():
        return grad_x, grad_weight.zero_()
    architecture = architecture_of(x.device)
    launch = launch_parameters(architecture, "rms_norm_backward", width)
    rows = x.numel() // width
    rows_per_program = triton.cdiv(rows, launch["programs"])
    programs = triton.cdiv(rows, rows_per_program)
    weight_sums = x.new_empty((programs, width), dtype=torch.float32) if weight_grad else grad_x
    with on_device_of(x):
        kernel = backward_wide_kernel if "block_columns" in launch else backward_kernel
        kernel[(programs,)](
            grad_y,
            grad_y if grad_residual is None else grad_residual.contiguous(),
            x,
            weight,
            grad_x,
            weight_sums,
            rows,
            rows_per_program,
            width,
            eps,
            RESIDUAL=grad_residual is not None,
            WEIGHT=weight_grad,
            BLOCK=launch.get("block_columns", triton.next_power_of_2(width)),
            num_warps=launch["num_warps"],
            **LAUNCH_OPTIONS,
        )
        if weight_grad:
            reduce = launch_parameters(architecture, "rms_norm_reduce", width)
            reduce_kernel[(triton.cdiv(width, reduce["block_columns"]),)](
                weight_sums,
                grad_weight,
                programs,
                width,
                CHUNKS=reduce["block_rows"],
                COLUMNS=reduce["block_columns"],
                num_warps=reduce["num_warps"],
                **LAUNCH_OPTIONS,
            )
    return grad_x, grad_weight


def _shipped_forward(dtype: torch.dtype, entry: dict[str, int], residual: bool) -> ShippedKernel:
    pointer = f"*{TRITON_DTYPES[dtype]}"
    wide = "block_columns" in entry
    signature = dict.fromkeys(("x", "residual", "weight", "y", "new_residual"), pointer)
    signature |= {"width": "i32", "eps": "fp32"} if wide else {"rows": "i32", "width": "i32", "eps": "fp32"}
    shape = (
        {"BLOCK": entry["block_columns"]} if wide else {"ROWS": entry["rows_per_program"], "BLOCK": entry["max_width"]}
    )
    return ShippedKernel(
        operator="add_rms_norm" if residual else "rms_norm",
        kernel=forward_wide_kernel if wide else forward_kernel,
        dtype=dtype,
        width=entry["max_width"],
        signature=signature,
        constants={"RESIDUAL": residual, **shape},
        num_warps=entry["num_warps"],
        divisible_by_16=("width",),
    )


def _shipped_backward(dtype: torch.dtype, entry: dict[str, int], residual: bool, weight: bool) -> ShippedKernel:
    signature = dict.fromkeys(("grad_y", "grad_residual", "x", "weight", "grad_x"), f"*{TRITON_DTYPES[dtype]}")
    signature |= {"weight_sums": "*fp32", "rows": "i32", "rows_per_program": "i32", "width": "i32", "eps": "fp32"}
    block = entry.get("block_columns", entry["max_width"])
    return ShippedKernel(
        operator="rms_norm_backward",
        kernel=backward_wide_kernel if "block_columns" in entry else backward_kernel,
        dtype=dtype,
        width=entry["max_width"],
        signature=signature,
        constants={"RESIDUAL": residual, "WEIGHT": weight, "BLOCK": block},
        num_warps=entry["num_warps"],
        divisible_by_16=("width",),
    )


def shipped_kernels(architecture: str) -> Iterator[ShippedKernel]:
    """Every kernel at every launch parameter of an architecture, at the widest row that each entry serves."""
    table = load_device(architecture).launch
    for dtype, element in TRITON_DTYPES.items():
        for residual in (False, True):
            for entry in table["rms_norm_forward"]:
                yield _shipped_forward(dtype, entry, residual)
            for entry in table["rms_norm_backward"]:
                yield _shipped_backward(dtype, entry, residual, weight=True)
        for entry in table["rms_norm_backward"]:
            yield _shipped_backward(dtype, entry, residual=False, weight=False)
        for entry in table["rms_norm_reduce"]:
            yield ShippedKernel(
                operator="rms_norm_backward",
                kernel=reduce_kernel,
                dtype=dtype,
                width=entry["max_width"],
                signature={"weight_sums": "*fp32", "grad_weight": f"*{element}", "chunks": "i32", "width": "i32"},
                constants={"CHUNKS": entry["block_rows"], "COLUMNS": entry["block_columns"]},
                num_warps=entry["num_warps"],
                divisible_by_16=("width",),
            )
