"""GPU kernels of geglu: elementwise, each byte read and written once.

program p:  row p // blocks, columns [(p % blocks) * BLOCK, + BLOCK) of the hidden half and of the gate half
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from dreamkernels.devices import architecture_of, launch_parameters, load_device
from dreamkernels.ops.launch import LAUNCH_OPTIONS, TRITON_DTYPES, ShippedKernel, on_device_of


@triton.jit
def forward_kernel(x, y, width, blocks, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    hidden = tl.load(x + row * 2 * width + column, inside, other=0.0).to(tl.float32)
    gate = tl.load(x + row * 2 * width + width + column, inside, other=0.0).to(tl.float32)
    cdf = 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
    tl.store(y + row * width + column, (hidden * gate * cdf).to(y.dtype.element_ty), inside)


@triton.jit
def backward_kernel(grad_y, x, grad_x, width, blocks, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    hidden = tl.load(x + row * 2 * width + column, inside, other=0.0).to(tl.float32)
    gate = tl.load(x + row * 2 * width + width + column, inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_y + row * width + column, inside, other=0.0).to(tl.float32)
    cdf = 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    grad_hidden = grad * gate * cdf
    grad_gate = grad * hidden * (cdf + gate * density)
    tl.store(grad_x + row * 2 * width + column, grad_hidden.to(grad_x.dtype.element_ty), inside)
    tl.store(grad_x + row * 2 * width + width + column, grad_gate.to(grad_x.dtype.element_ty), inside)


def geglu(x: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    width = x.shape[-1] // 2
    y = x.new_empty((*x.shape[:-1], width))
    if y.numel():
        launch = launch_parameters(architecture_of(x.device), "geglu_forward", width)
        blocks = triton.cdiv(width, launch["block_columns"])
        with on_device_of(x):
            forward_kernel[(y.numel() // width * blocks,)](
                x, y, width, blocks, BLOCK=launch["block_columns"], num_warps=launch["num_warps"], **LAUNCH_OPTIONS
            )
    return y


def geglu_backward(grad_y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    grad_y, x = grad_y.contiguous(), x.contiguous()
    width = x.shape[-1] // 2
    grad_x = torch.empty_like(x)
    if grad_y.numel():
        launch = launch_parameters(architecture_of(x.device), "geglu_backward", width)
        blocks = triton.cdiv(width, launch["block_columns"])
        with on_device_of(x):
            backward_kernel[(grad_y.numel() // width * blocks,)](
                grad_y,
                x,
                grad_x,
                width,
                blocks,
                BLOCK=launch["block_columns"],
                num_warps=launch["num_warps"],
                **LAUNCH_OPTIONS,
            )
    return grad_x


def shipped_kernels(architecture: str) -> Iterator[ShippedKernel]:
    """Every kernel at every launch parameter of an architecture."""
    table = load_device(architecture).launch
    for dtype, element in TRITON_DTYPES.items():
        for kernel, pointers in ((forward_kernel, ("x", "y")), (backward_kernel, ("grad_y", "x", "grad_x"))):
            name = kernel.__name__.removesuffix("_kernel")
            for entry in table[f"geglu_{name}"]:
                yield ShippedKernel(
                    operator="geglu" if kernel is forward_kernel else "geglu_backward",
                    kernel=kernel,
                    dtype=dtype,
                    width=entry["max_width"],
                    signature={**dict.fromkeys(pointers, f"*{element}"), "width": "i32", "blocks": "i32"},
                    constants={"BLOCK": entry["block_columns"]},
                    num_warps=entry["num_warps"],
                    divisible_by_16=("width",),
                )
