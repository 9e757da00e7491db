"""GPU kernels of layer_norm.

Forward: one program holds ROWS whole rows in registers, so a row is read once and written once.

    program p:  rows [p * ROWS, (p + 1) * ROWS) x columns [0, BLOCK), BLOCK = width rounded up to a power of two

Backward: one program walks over a contiguous chunk of rows and keeps the weight and bias gradients of its chunk in
registers; a second kernel adds the chunks in their order. The number of chunks is a launch parameter of the
architecture, so results repeat bit for bit.
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
    weight,
    bias,
    y,
    rows,
    width,
    eps,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    v = tl.load(x + at, inside, other=0.0).to(tl.float32)
    mean = tl.sum(v, axis=1) / width
    d = tl.where(inside, v - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(d * d, axis=1) / width + eps)
    out = d * rstd[:, None]
    if WEIGHT:
        out *= tl.load(weight + column, column < width, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        out += tl.load(bias + column, column < width, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, out.to(y.dtype.element_ty), inside)


@triton.jit
def backward_kernel(
    grad_y,
    x,
    weight,
    grad_x,
    sums,
    rows,
    rows_per_program,
    width,
    eps,
    WEIGHT: tl.constexpr,
    AFFINE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    if WEIGHT:
        scale = tl.load(weight + column, inside, other=0.0).to(tl.float32)
    if AFFINE:
        weight_sum = tl.zeros([BLOCK], tl.float32)
        bias_sum = tl.zeros([BLOCK], tl.float32)
    begin = program * rows_per_program
    for row in range(begin, tl.minimum(begin + rows_per_program, rows)):
        at = row * width + column
        v = tl.load(x + at, inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_y + at, inside, other=0.0).to(tl.float32)
        mean = tl.sum(v, axis=0) / width
        d = tl.where(inside, v - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(d * d, axis=0) / width + eps)
        normalised = d * rstd
        g = grad
        if WEIGHT:
            g = grad * scale
        g_mean = tl.sum(g, axis=0) / width
        projection = tl.sum(g * normalised, axis=0) / width
        out = rstd * (g - g_mean - normalised * projection)
        tl.store(grad_x + at, out.to(grad_x.dtype.element_ty), inside)
        if AFFINE:
            weight_sum += grad * normalised
            bias_sum += grad
    if AFFINE:
        tl.store(sums + program * 2 * width + column, weight_sum, inside)
        tl.store(sums + program * 2 * width + width + column, bias_sum, inside)


@triton.jit
def reduce_kernel(sums, grad_weight, grad_bias, chunks, width, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr):
    columns = 2 * width  # the weight's, then the bias's
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        inside = (chunk < chunks)[:, None] & (column < columns)[None, :]
        total += tl.sum(tl.load(sums + chunk[:, None] * columns + column[None, :], inside, other=0.0), axis=0)
    grad = total.to(grad_weight.dtype.element_ty)
    tl.store(grad_weight + column, grad, column < width)
    tl.store(grad_bias + column - width, grad, (column >= width) & (column < columns))


def layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    width = x.shape[-1]
    if x.numel():
        rows = x.numel() // width
        launch = launch_parameters(architecture_of(x.device), "layer_norm_forward", width)
        per_program = launch["rows_per_program"]
        with on_device_of(x):
            forward_kernel[(triton.cdiv(rows, per_program),)](
                x,
                x if weight is None else weight.contiguous(),
                x if bias is None else bias.contiguous(),
                y,
                rows,
                width,
                eps,
                WEIGHT=weight is not None,
                BIAS=bias is not None,
                ROWS=per_program,
                BLOCK=triton.next_power_of_2(width),
                num_warps=launch["num_warps"],
                **LAUNCH_OPTIONS,
            )
    return y


def layer_norm_backward(
    grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, eps: float, affine_grad: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_y, x = grad_y.contiguous(), x.contiguous()
    width = x.shape[-1]
    grad_x = torch.empty_like(x)
    grad_weight, grad_bias = (x.new_empty(width if affine_grad else 0) for _ in range(2))
    if not x.numel():
        return grad_x, grad_weight.zero_(), grad_bias.zero_()
    architecture = architecture_of(x.device)
    launch = launch_parameters(architecture, "layer_norm_backward", width)
    rows = x.numel() // width
    rows_per_program = triton.cdiv(rows, launch["programs"])
    programs = triton.cdiv(rows, rows_per_program)
    sums = x.new_empty((programs, 2, width), dtype=torch.float32) if affine_grad else grad_x
    with on_device_of(x):
        backward_kernel[(programs,)](
            grad_y,
            x,
            x if weight is None else weight.contiguous(),
            grad_x,
            sums,
            rows,
            rows_per_program,
            width,
            eps,
            WEIGHT=weight is not None,
            AFFINE=affine_grad,
            BLOCK=triton.next_power_of_2(width),
            num_warps=launch["num_warps"],
            **LAUNCH_OPTIONS,
        )
        if affine_grad:
            reduce = launch_parameters(architecture, "layer_norm_reduce", 2 * width)
            reduce_kernel[(triton.cdiv(2 * width, reduce["block_columns"]),)](
                sums,
                grad_weight,
                grad_bias,
                programs,
                width,
                CHUNKS=reduce["block_rows"],
                COLUMNS=reduce["block_columns"],
                num_warps=reduce["num_warps"],
                **LAUNCH_OPTIONS,
            )
    return grad_x, grad_weight, grad_bias


def _shipped_backward(dtype: torch.dtype, entry: dict[str, int], affine: bool) -> ShippedKernel:
    signature = dict.fromkeys(("grad_y", "x", "weight", "grad_x"), f"*{TRITON_DTYPES[dtype]}")
    signature |= {"sums": "*fp32", "rows": "i32", "rows_per_program": "i32", "width": "i32", "eps": "fp32"}
    return ShippedKernel(
        operator="layer_norm_backward",
        kernel=backward_kernel,
        dtype=dtype,
        width=entry["max_width"],
        signature=signature,
        constants={"WEIGHT": True, "AFFINE": affine, "BLOCK": entry["max_width"]},
        num_warps=entry["num_warps"],
        divisible_by_16=("width",),
    )


def shipped_kernels(architecture: str) -> Iterator[ShippedKernel]:
    """Every kernel at every launch parameter of an architecture, at the widest row that each entry serves."""
    table = load_device(architecture).launch
    for dtype, element in TRITON_DTYPES.items():
        for entry in table["layer_norm_forward"]:
            signature = dict.fromkeys(("x", "weight", "bias", "y"), f"*{element}")
            yield ShippedKernel(
                operator="layer_norm",
                kernel=forward_kernel,
                dtype=dtype,
                width=entry["max_width"],
                signature={**signature, "rows": "i32", "width": "i32", "eps": "fp32"},
                constants={
                    "WEIGHT": True,
                    "BIAS": True,
                    "ROWS": entry["rows_per_program"],
                    "BLOCK": entry["max_width"],
                },
                num_warps=entry["num_warps"],
                divisible_by_16=("width",),
            )
        for entry in table["layer_norm_backward"]:
            for affine in (False, True):
                yield _shipped_backward(dtype, entry, affine)
        for entry in table["layer_norm_reduce"]:
            yield ShippedKernel(
                operator="layer_norm_backward",
                kernel=reduce_kernel,
                dtype=dtype,
                width=entry["max_width"],
                signature={
                    "sums": "*fp32",
                    "grad_weight": f"*{element}",
                    "grad_bias": f"*{element}",
                    "chunks": "i32",
                    "width": "i32",
                },
                constants={"CHUNKS": entry["block_rows"], "COLUMNS": entry["block_columns"]},
                num_warps=entry["num_warps"],
                divisible_by_16=("width",),
            )
