"""GPU kernels of swiglu: element by element, over rows at any distance.

    program (p, c):  rows [p * ROWS, (p + 1) * ROWS) x columns [c * BLOCK, (c + 1) * BLOCK)

The packed form runs the same kernels on the halves of its rows.
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
    gate,
    up,
    y,
    rows,
    width,
    gate_stride,
    up_stride,
    y_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    g = tl.load(gate + row[:, None] * gate_stride + column[None, :], inside, other=0.0).to(tl.float32)
    u = tl.load(up + row[:, None] * up_stride + column[None, :], inside, other=0.0).to(tl.float32)
    product = g / (1.0 + tl.exp(-g)) * u
    tl.store(y + row[:, None] * y_stride + column[None, :], product.to(y.dtype.element_ty), inside)


@triton.jit
def backward_kernel(
    grad_y,
    gate,
    up,
    grad_gate,
    grad_up,
    rows,
    width,
    grad_y_stride,
    gate_stride,
    up_stride,
    grad_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    d = tl.load(grad_y + row[:, None] * grad_y_stride + column[None, :], inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row[:, None] * gate_stride + column[None, :], inside, other=0.0).to(tl.float32)
    u = tl.load(up + row[:, None] * up_stride + column[None, :], inside, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-g))
    scaled = d * s
    at = row[:, None] * grad_stride + column[None, :]
    tl.store(grad_gate + at, (scaled * u * (1.0 + g * (1.0 - s))).to(grad_gate.dtype.element_ty), inside)
    tl.store(grad_up + at, (scaled * g).to(grad_up.dtype.element_ty), inside)


def _row_stride(x: torch.Tensor) -> int | None:
    """The distance between rows; None where the columns are strided, or the rows are not at one distance."""
    width = x.shape[-1]
    if width > 1 and x.stride(-1) != 1:
        return None
    stride, expected = None, 0
    for size, step in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if stride is None:
            stride = step
        elif step != expected:
            return None
        expected = step * size
    return width if stride is None else stride


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    stride = _row_stride(x)
    return (x.contiguous(), x.shape[-1]) if stride is None else (x, stride)


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = x.chunk(2, -1)
    return first, second


def _grid(rows: int, width: int, launch: dict[str, int]) -> tuple[int, int]:
    return triton.cdiv(rows, launch["rows_per_program"]), triton.cdiv(width, launch["block_columns"])


def _forward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if not gate.numel():
        return y
    (gate, gate_stride), (up, up_stride) = _rows(gate), _rows(up)
    width = gate.shape[-1]
    rows = gate.numel() // width
    launch = launch_parameters(architecture_of(gate.device), "swiglu_forward", width)
    with on_device_of(gate):
        forward_kernel[_grid(rows, width, launch)](
            gate,
            up,
            y,
            rows,
            width,
            gate_stride,
            up_stride,
            width,
            ROWS=launch["rows_per_program"],
            BLOCK=launch["block_columns"],
            num_warps=launch["num_warps"],
            **LAUNCH_OPTIONS,
        )
    return y


def _backward(
    grad_y: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    grad_gate: torch.Tensor,
    grad_up: torch.Tensor,
    grad_stride: int,
) -> None:
    if not gate.numel():
        return
    (grad_y, grad_y_stride), (gate, gate_stride), (up, up_stride) = _rows(grad_y), _rows(gate), _rows(up)
    width = gate.shape[-1]
    rows = gate.numel() // width
    launch = launch_parameters(architecture_of(gate.device), "swiglu_backward", width)
    with on_device_of(gate):
        backward_kernel[_grid(rows, width, launch)](
            grad_y,
            gate,
            up,
            grad_gate,
            grad_up,
            rows,
            width,
            grad_y_stride,
            gate_stride,
            up_stride,
            grad_stride,
            ROWS=launch["rows_per_program"],
            BLOCK=launch["block_columns"],
            num_warps=launch["num_warps"],
            **LAUNCH_OPTIONS,
        )


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return _forward(gate, up)


def swiglu_packed(gate_up: torch.Tensor) -> torch.Tensor:
    return _forward(*_halves(gate_up))


def swiglu_backward(grad_y: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    grad_gate, grad_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    _backward(grad_y, gate, up, grad_gate, grad_up, gate.shape[-1])
    return grad_gate, grad_up


def swiglu_packed_backward(grad_y: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    grad = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    _backward(grad_y, *_halves(gate_up), *_halves(grad), gate_up.shape[-1])
    return grad


def _shipped(
    operator: str, dtype: torch.dtype, entry: dict[str, int], tensors: tuple[str, ...], strides: tuple[str, ...]
) -> ShippedKernel:
    signature = dict.fromkeys(tensors, f"*{TRITON_DTYPES[dtype]}")
    signature |= dict.fromkeys(("rows", "width", *strides), "i32")
    return ShippedKernel(
        operator=operator,
        kernel=forward_kernel if operator == "swiglu" else backward_kernel,
        dtype=dtype,
        width=entry["max_width"],
        signature=signature,
        constants={"ROWS": entry["rows_per_program"], "BLOCK": entry["block_columns"]},
        num_warps=entry["num_warps"],
        divisible_by_16=("width", *strides),
    )


def shipped_kernels(architecture: str) -> Iterator[ShippedKernel]:
    """Every kernel at every launch parameter of an architecture."""
    table = load_device(architecture).launch
    for dtype in TRITON_DTYPES:
        for entry in table["swiglu_forward"]:
            yield _shipped("swiglu", dtype, entry, ("gate", "up", "y"), ("gate_stride", "up_stride", "y_stride"))
        for entry in table["swiglu_backward"]:
            tensors = ("grad_y", "gate", "up", "grad_gate", "grad_up")
            strides = ("grad_y_stride", "gate_stride", "up_stride", "grad_stride")
            yield _shipped("swiglu_backward", dtype, entry, tensors, strides)
