"""GPU kernel of softmax_groups: a program takes a tile [GROUPS, BLOCK] of whole groups, BLOCK a power of two."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from dreamkernels.devices import architecture_of, launch_parameters, load_device
from dreamkernels.ops.launch import LAUNCH_OPTIONS, TRITON_DTYPES, ShippedKernel, on_device_of


@triton.jit
def softmax_kernel(x, groups, size, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    element = tl.arange(0, BLOCK)
    inside = (group < groups)[:, None] & (element < size)[None, :]
    at = group[:, None] * size + element[None, :]
    values = tl.load(x + at, inside, other=float("-inf")).to(tl.float32)
    values = tl.where((group < groups)[:, None], values, 0.0)  # rows of minus infinity alone would make NaN
    exponentials = tl.exp(values - tl.max(values, axis=1)[:, None])
    tl.store(x + at, (exponentials / tl.sum(exponentials, axis=1)[:, None]).to(x.dtype.element_ty), inside)


def softmax_groups(x: torch.Tensor, size: int) -> None:
    if x.numel() == 0:
        return
    groups = x.numel() // size
    launch = launch_parameters(architecture_of(x.device), "softmax_groups", size)
    per_program = launch["groups_per_program"]
    with on_device_of(x):
        softmax_kernel[(triton.cdiv(groups, per_program),)](
            x,
            groups,
            size,
            GROUPS=per_program,
            BLOCK=triton.next_power_of_2(size),
            num_warps=launch["num_warps"],
            **LAUNCH_OPTIONS,
        )


def shipped_kernels(architecture: str) -> Iterator[ShippedKernel]:
    """The kernel at every launch parameter of an architecture, at the largest group that each entry serves."""
    for dtype, element in TRITON_DTYPES.items():
        for entry in load_device(architecture).launch["softmax_groups"]:
            yield ShippedKernel(
                operator="softmax_groups",
                kernel=softmax_kernel,
                dtype=dtype,
                width=entry["max_width"],
                signature={"x": f"*{element}", "groups": "i64", "size": "i32"},
                constants={"GROUPS": entry["groups_per_program"], "BLOCK": entry["max_width"]},
                num_warps=entry["num_warps"],
                divisible_by_16=("size",),
            )
