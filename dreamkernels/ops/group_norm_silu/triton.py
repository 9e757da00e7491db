"""Launches the group_norm_silu kernels (triton_forward.py, triton_backward.py) for both layouts, lists those that ship.

A group of Stable Diffusion's UNet has 10 x 64 x 64 elements, one of its VAE 4 x 512 x 512: too many for one program. So
three kernels, whose second one is tiny: sums of chunks of positions per channel, from them the statistics per sample
and group, then the result. x is read twice, the second time largely from the second-level cache.

    tile of the first and the third:  CHANNELS channels x POSITIONS positions of one sample,
    program p:  chunk p % chunks, block of channels p // chunks % channel blocks, sample p // chunks // channel blocks

Groups of up to `max_width` elements that lie together (channels first) take one program each, and one kernel.
The order of all sums depends on the shape and the launch parameters only, so results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton

from dreamkernels.devices import architecture_of, launch_parameters, load_device
from dreamkernels.ops.group_norm_silu import layout_of
from dreamkernels.ops.group_norm_silu.triton_backward import (
    backward_apply_kernel,
    backward_statistics_kernel,
    backward_sum_kernel,
)
from dreamkernels.ops.group_norm_silu.triton_forward import apply_kernel, group_kernel, statistics_kernel, sum_kernel
from dreamkernels.ops.launch import LAUNCH_OPTIONS, TRITON_DTYPES, ShippedKernel, on_device_of
from dreamkernels.ops.layer_norm.triton import reduce_kernel

# A group's channels are walked over in blocks of this many by the two statistics kernels.
GROUP_CHANNELS = 64


class _Problem:
    """The sizes of one call, and how it is cut into programs."""

    def __init__(self, x: torch.Tensor, groups: int) -> None:
        self.layout = layout_of(x)
        self.last = self.layout != torch.contiguous_format
        self.samples, self.channels = x.shape[:2]
        self.positions = x.numel() // (self.samples * self.channels)
        self.groups = groups
        launch = launch_parameters(architecture_of(x.device), f"group_norm_silu_{'last' if self.last else 'first'}", 1)
        self.tile = {"CHANNELS": launch["block_channels"], "POSITIONS": launch["block_positions"], "LAST": self.last}
        self.warps = launch["num_warps"]
        self.channel_blocks = triton.cdiv(self.channels, launch["block_channels"])
        self.tiles = triton.cdiv(self.positions, launch["block_positions"])
        self.per_chunk = launch["block_positions"] * launch["tiles_per_chunk"]
        self.chunks = triton.cdiv(self.positions, self.per_chunk)

    def grid(self, chunks: int) -> tuple[int]:
        return (chunks * self.channel_blocks * self.samples,)

    def new_partial(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_empty((self.samples, self.chunks, 3, self.channels), dtype=torch.float32)


def _contiguous(x: torch.Tensor, *others: torch.Tensor | None) -> list[torch.Tensor]:
    """Row-major parameters; x in place of absent ones, which are never read."""
    return [x if other is None else other.contiguous() for other in others]


def group_norm_silu(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = x.contiguous(memory_format=layout_of(x))
    y = torch.empty_like(x)
    mean, rstd = (x.new_empty((x.shape[0], groups), dtype=torch.float32) for _ in range(2))
    if not x.numel():
        return y, mean.zero_(), rstd.zero_()
    problem = _Problem(x, groups)
    channels, positions = problem.channels, problem.positions
    parameters = _contiguous(x, shift, weight, bias)
    present = {"SHIFT": shift is not None, "WEIGHT": weight is not None, "BIAS": bias is not None}
    architecture = architecture_of(x.device)
    elements = channels // groups * positions
    with on_device_of(x):
        whole = load_device(architecture).launch["group_norm_silu_group"]
        if not problem.last and elements <= whole[-1]["max_width"]:
            launch = launch_parameters(architecture, "group_norm_silu_group", elements)
            group_kernel[(problem.samples * groups,)](
                x,
                *parameters,
                y,
                mean,
                rstd,
                channels,
                positions,
                groups,
                eps,
                **present,
                SILU=silu,
                BLOCK=triton.next_power_of_2(elements),
                num_warps=launch["num_warps"],
                **LAUNCH_OPTIONS,
            )
            return y, mean, rstd
        partial = problem.new_partial(x)
        sum_kernel[problem.grid(problem.chunks)](
            x,
            partial,
            channels,
            positions,
            problem.chunks,
            problem.channel_blocks,
            problem.per_chunk,
            **problem.tile,
            num_warps=problem.warps,
            **LAUNCH_OPTIONS,
        )
        statistics_kernel[(problem.samples * groups,)](
            partial,
            parameters[0],
            mean,
            rstd,
            channels,
            positions,
            groups,
            problem.chunks,
            problem.per_chunk,
            eps,
            SHIFT=shift is not None,
            CHANNELS=GROUP_CHANNELS,
            num_warps=1,
            **LAUNCH_OPTIONS,
        )
        apply_kernel[problem.grid(problem.tiles)](
            x,
            *parameters,
            mean,
            rstd,
            y,
            channels,
            positions,
            groups,
            problem.tiles,
            problem.channel_blocks,
            **present,
            SILU=silu,
            **problem.tile,
            num_warps=problem.warps,
            **LAUNCH_OPTIONS,
        )
    return y, mean, rstd


def group_norm_silu_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    shift: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    groups: int,
    silu: bool,
    x_grad: bool,
    affine_grad: bool,
    shift_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    layout = layout_of(x)
    x, grad_y = x.contiguous(memory_format=layout), grad_y.contiguous(memory_format=layout)
    samples, channels = x.shape[:2]
    grad_x = torch.empty_like(x) if x_grad else x.new_empty(0)
    grad_weight, grad_bias = (x.new_empty(channels if affine_grad else 0) for _ in range(2))
    grad_shift = x.new_empty((samples if shift_grad else 0, channels))
    if not x.numel():
        return grad_x, grad_weight.zero_(), grad_bias.zero_(), grad_shift.zero_()
    problem = _Problem(x, groups)
    positions = problem.positions
    parameters = _contiguous(x, shift, weight, bias)
    options = {"SHIFT": shift is not None, "WEIGHT": weight is not None, "BIAS": bias is not None, "SILU": silu}
    options |= {**problem.tile, "num_warps": problem.warps, **LAUNCH_OPTIONS}
    partial = problem.new_partial(x)
    means = x.new_empty((samples, groups, 2), dtype=torch.float32)
    affine_sums = x.new_empty((samples if affine_grad else 0, 2, channels), dtype=torch.float32)
    with on_device_of(x):
        backward_sum_kernel[problem.grid(problem.chunks)](
            grad_y,
            x,
            *parameters,
            mean,
            rstd,
            partial,
            channels,
            positions,
            groups,
            problem.chunks,
            problem.channel_blocks,
            problem.per_chunk,
            **options,
        )
        backward_statistics_kernel[(samples * groups,)](
            partial,
            parameters[1],
            rstd,
            means,
            affine_sums,
            grad_shift,
            channels,
            positions,
            groups,
            problem.chunks,
            WEIGHT=weight is not None,
            AFFINE=affine_grad,
            SHIFT_GRAD=shift_grad,
            CHANNELS=GROUP_CHANNELS,
            num_warps=1,
            **LAUNCH_OPTIONS,
        )
        if x_grad:
            backward_apply_kernel[problem.grid(problem.tiles)](
                grad_y,
                x,
                *parameters,
                mean,
                rstd,
                means,
                grad_x,
                channels,
                positions,
                groups,
                problem.tiles,
                problem.channel_blocks,
                **options,
            )
        if affine_grad:
            reduce = launch_parameters(architecture_of(x.device), "layer_norm_reduce", 2 * channels)
            reduce_kernel[(triton.cdiv(2 * channels, reduce["block_columns"]),)](
                affine_sums,
                grad_weight,
                grad_bias,
                samples,
                channels,
                CHUNKS=reduce["block_rows"],
                COLUMNS=reduce["block_columns"],
                num_warps=reduce["num_warps"],
                **LAUNCH_OPTIONS,
            )
    return grad_x, grad_weight, grad_bias, grad_shift


def _shipped(kernel, dtype: torch.dtype, width: int, constants: dict[str, int], num_warps: int) -> ShippedKernel:
    """The signature from the kernel's own arguments, which have the same names and types everywhere."""
    elements = ("x", "y", "shift", "weight", "bias", "grad_x", "grad_y", "grad_shift")
    floats = ("mean", "rstd", "mean_out", "rstd_out", "partial", "means", "affine_sums")
    signature = {}
    for name in kernel.arg_names:
        if name in elements:
            signature[name] = f"*{TRITON_DTYPES[dtype]}"
        elif name in floats:
            signature[name] = "*fp32"
        elif name not in constants:
            signature[name] = "fp32" if name == "eps" else "i32"
    return ShippedKernel(
        operator="group_norm_silu_backward" if kernel.__name__.startswith("backward") else "group_norm_silu",
        kernel=kernel,
        dtype=dtype,
        width=width,
        signature=signature,
        constants=constants,
        num_warps=num_warps,
        divisible_by_16=tuple(name for name in ("channels", "positions", "per_chunk") if name in signature),
    )


def shipped_kernels(architecture: str) -> Iterator[ShippedKernel]:
    """Every kernel at every launch parameter of an architecture, with all parameters and SiLU."""
    table = load_device(architecture).launch
    present = {"SHIFT": True, "WEIGHT": True, "BIAS": True, "SILU": True}
    for dtype in TRITON_DTYPES:
        for entry in table["group_norm_silu_group"]:
            width = entry["max_width"]
            yield _shipped(group_kernel, dtype, width, {**present, "BLOCK": width}, entry["num_warps"])
        for last in (False, True):
            (entry,) = table[f"group_norm_silu_{'last' if last else 'first'}"]
            tile = {"LAST": last, "CHANNELS": entry["block_channels"], "POSITIONS": entry["block_positions"]}
            for kernel in (sum_kernel, apply_kernel, backward_sum_kernel, backward_apply_kernel):
                constants = tile if kernel is sum_kernel else {**present, **tile}
                yield _shipped(kernel, dtype, entry["max_width"], constants, entry["num_warps"])
    # Their loads are of channels of one group, which need not be aligned, and negligible.
    constants = {"SHIFT": True, "CHANNELS": GROUP_CHANNELS}
    yield _shipped(statistics_kernel, torch.bfloat16, 1048576, constants, 1)
    constants = {"WEIGHT": True, "AFFINE": True, "SHIFT_GRAD": True, "CHANNELS": GROUP_CHANNELS}
    yield _shipped(backward_statistics_kernel, torch.bfloat16, 1048576, constants, 1)
