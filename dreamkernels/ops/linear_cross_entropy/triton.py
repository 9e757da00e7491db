"""Launches the GPU kernels of linear_cross_entropy, chunk by chunk; see kernels.py for what they do."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import triton

from dreamkernels.devices import architecture_of, launch_parameters, load_device
from dreamkernels.ops.launch import LAUNCH_OPTIONS, TRITON_DTYPES, ShippedKernel, on_device_of
from dreamkernels.ops.linear_cross_entropy.kernels import (
    gather_kernel,
    hidden_grad_kernel,
    logits_kernel,
    loss_kernel,
    scale_kernel,
    weight_grad_kernel,
)

CHUNK_BYTES = 256 * 2**20  # logits of 4096 rows and 32,008 bfloat16: enough blocks for several waves of any GPU
ROW_PADDING = 128
NONE, MEAN, SUM = 0, 1, 2


class Compacted(NamedTuple):
    """Rows with a target first, in their order; all on the device."""

    order: torch.Tensor  # int64 [T]: positions of the rows with a target, then of the others
    valid: torch.Tensor  # int64 [1]: how many have one
    targets: torch.Tensor


def _compact(targets: torch.Tensor, ignore_index: int) -> Compacted:
    valid = targets != ignore_index
    number = torch.arange(targets.shape[0], device=targets.device)
    rank = valid.cumsum(0)
    position = torch.where(valid, rank - 1, rank[-1] + number - rank)
    return Compacted(torch.empty_like(number).scatter_(0, position, number), rank[-1:].clone(), targets.contiguous())


def _grouped(kernel: str, x: torch.Tensor, width: int) -> dict[str, Any]:
    suffix = "_float32" if x.dtype == torch.float32 else ""
    launch = launch_parameters(architecture_of(x.device), f"linear_cross_entropy_{kernel}{suffix}", width)
    return {
        "BLOCK_M": launch["block_rows"],
        "BLOCK_N": launch["block_columns"],
        "BLOCK_K": launch["block_inner"],
        "GROUP": launch["group"],
        "num_warps": launch["num_warps"],
        **LAUNCH_OPTIONS,
    }


def _tiles(options: dict[str, Any], rows: int, columns: int) -> tuple[int]:
    return (triton.cdiv(rows, options["BLOCK_M"]) * triton.cdiv(columns, options["BLOCK_N"]),)


def _run(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: Compacted,
    grad_loss: torch.Tensor,
    losses: torch.Tensor | None,
    reduction: int,
    softcap: float,
    z_loss: float,
    chunk: int,
    hidden_grad: bool,
    weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    length, width = hidden.shape
    vocabulary = weight.shape[0]
    padded = triton.cdiv(vocabulary, ROW_PADDING) * ROW_PADDING
    fitting = max(ROW_PADDING, CHUNK_BYTES // (padded * hidden.element_size()) // ROW_PADDING * ROW_PADDING)
    step = min(chunk or fitting, length)
    order, count, _ = targets
    states, logits = hidden.new_empty((step, width)), hidden.new_empty((step, padded))
    grad_hidden = hidden.new_zeros(hidden.shape if hidden_grad else (0,))
    grad_weight = weight.new_empty(weight.shape if weight_grad else (0,))
    sums = grad_weight
    if weight_grad and step < length and weight.dtype != torch.float32:
        sums = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    products = {name: _grouped(name, hidden, width) for name in ("logits", "hidden_grad", "weight_grad")}
    architecture = architecture_of(hidden.device)
    gather = launch_parameters(architecture, "linear_cross_entropy_gather", width)
    rows_launch = launch_parameters(architecture, "linear_cross_entropy_loss", vocabulary)
    for start in range(0, length, step):
        rows = min(step, length - start)
        gather_kernel[(rows,)](
            hidden,
            order,
            count,
            states,
            start,
            width,
            BLOCK=gather["block_columns"],
            num_warps=gather["num_warps"],
            **LAUNCH_OPTIONS,
        )
        options = products["logits"]
        logits_kernel[_tiles(options, rows, padded)](
            states, weight, count, logits, start, rows, vocabulary, padded, width, **options
        )
        loss_kernel[(rows,)](
            logits,
            targets.targets,
            order,
            count,
            grad_loss,
            grad_loss if losses is None else losses,
            start,
            vocabulary,
            padded,
            softcap,
            z_loss,
            GRADIENT=hidden_grad or weight_grad,
            LOSS=losses is not None,
            CAP=softcap != 0.0,
            MEAN=reduction == MEAN,
            PER_ROW=reduction == NONE,
            BLOCK=rows_launch["block_columns"],
            num_warps=rows_launch["num_warps"],
            **LAUNCH_OPTIONS,
        )
        if hidden_grad:
            options = products["hidden_grad"]
            hidden_grad_kernel[_tiles(options, rows, width)](
                logits, weight, order, count, grad_hidden, start, rows, vocabulary, padded, width, **options
            )
        if weight_grad:
            options = products["weight_grad"]
            weight_grad_kernel[_tiles(options, vocabulary, width)](
                logits, states, count, sums, grad_weight, start, rows, vocabulary, padded, width, **options
            )
    return grad_hidden, grad_weight


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    reduction: int,
    softcap: float,
    z_loss: float,
    chunk: int,
    hidden_grad: bool,
    weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight = hidden.contiguous(), weight.contiguous()
    losses = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
    if not hidden.shape[0]:
        return _without_rows(hidden, weight, losses, reduction, hidden_grad, weight_grad)
    with on_device_of(hidden):
        compacted = _compact(targets, ignore_index)
        per_loss = torch.ones(targets.shape if reduction == NONE else (1,), dtype=torch.float32, device=hidden.device)
        gradients = _run(
            hidden, weight, compacted, per_loss, losses, reduction, softcap, z_loss, chunk, hidden_grad, weight_grad
        )
    if reduction == NONE:
        return losses, *gradients
    total = losses.sum(dtype=torch.float64)
    if reduction == MEAN:
        total = total / compacted.valid[0].clamp(min=1)
    return total.float(), *gradients


def _without_rows(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    losses: torch.Tensor,
    reduction: int,
    hidden_grad: bool,
    weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_hidden = hidden.new_zeros(hidden.shape if hidden_grad else (0,))
    grad_weight = weight.new_zeros(weight.shape if weight_grad else (0,))
    return losses if reduction == NONE else losses.sum(), grad_hidden, grad_weight


def linear_cross_entropy_backward(
    grad_loss: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    reduction: int,
    softcap: float,
    z_loss: float,
    chunk: int,
    hidden_grad: bool,
    weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, weight = hidden.contiguous(), weight.contiguous()
    if not hidden.shape[0]:
        return _without_rows(hidden, weight, grad_loss, NONE, hidden_grad, weight_grad)[1:]
    with on_device_of(hidden):
        compacted = _compact(targets, ignore_index)
        return _run(
            hidden,
            weight,
            compacted,
            grad_loss.contiguous(),
            None,
            reduction,
            softcap,
            z_loss,
            chunk,
            hidden_grad,
            weight_grad,
        )


def linear_cross_entropy_scale(grad_hidden: torch.Tensor, grad_weight: torch.Tensor, grad_loss: torch.Tensor) -> None:
    launch = launch_parameters(architecture_of(grad_hidden.device), "linear_cross_entropy_scale", 1)
    for gradient in (grad_hidden, grad_weight):
        if count := gradient.numel():
            with on_device_of(gradient):
                scale_kernel[(triton.cdiv(count, launch["block_columns"]),)](
                    gradient,
                    grad_loss,
                    count,
                    BLOCK=launch["block_columns"],
                    num_warps=launch["num_warps"],
                    **LAUNCH_OPTIONS,
                )


def _shipped_product(kernel: Any, dtype: torch.dtype, entry: dict[str, int]) -> ShippedKernel:
    integers = ("start", "rows", "vocabulary", "padded", "width")
    kinds = {"order": "*i64", "count": "*i64", "sums": "*fp32"} | dict.fromkeys(integers, "i32")
    arguments = [argument for argument in kernel.arg_names if not argument.isupper()]
    return ShippedKernel(
        operator="linear_cross_entropy",
        kernel=kernel,
        dtype=dtype,
        width=entry["max_width"],
        signature={argument: kinds.get(argument, f"*{TRITON_DTYPES[dtype]}") for argument in arguments},
        constants={
            "BLOCK_M": entry["block_rows"],
            "BLOCK_N": entry["block_columns"],
            "BLOCK_K": entry["block_inner"],
            "GROUP": entry["group"],
        },
        num_warps=entry["num_warps"],
        divisible_by_16=("start", "padded", "width"),
    )


def _shipped_loss(dtype: torch.dtype, entry: dict[str, int], gradient: bool, cap: bool, per_row: bool) -> ShippedKernel:
    signature = {"logits": f"*{TRITON_DTYPES[dtype]}", "targets": "*i64", "order": "*i64", "count": "*i64"}
    signature |= {"grad_loss": "*fp32", "losses": "*fp32", "start": "i32", "vocabulary": "i32", "padded": "i32"}
    signature |= {"softcap": "fp32", "z_loss": "fp32"}
    flags = {"GRADIENT": gradient, "LOSS": not per_row, "CAP": cap, "MEAN": not per_row, "PER_ROW": per_row}
    return ShippedKernel(
        operator="linear_cross_entropy",
        kernel=loss_kernel,
        dtype=dtype,
        width=entry["max_width"],
        signature=signature,
        constants={**flags, "BLOCK": entry["block_columns"]},
        num_warps=entry["num_warps"],
        divisible_by_16=("start", "padded"),
    )


def shipped_kernels(architecture: str) -> Iterator[ShippedKernel]:
    """Every kernel at every launch parameter of an architecture."""
    table = load_device(architecture).launch
    for dtype, element in TRITON_DTYPES.items():
        suffix = "_float32" if dtype == torch.float32 else ""
        for name, kernel in (
            ("logits", logits_kernel),
            ("hidden_grad", hidden_grad_kernel),
            ("weight_grad", weight_grad_kernel),
        ):
            for entry in table[f"linear_cross_entropy_{name}{suffix}"]:
                yield _shipped_product(kernel, dtype, entry)
        for entry in table["linear_cross_entropy_gather"]:
            pointers = {"hidden": f"*{element}", "order": "*i64", "count": "*i64", "states": f"*{element}"}
            yield ShippedKernel(
                operator="linear_cross_entropy",
                kernel=gather_kernel,
                dtype=dtype,
                width=entry["max_width"],
                signature={**pointers, "start": "i32", "width": "i32"},
                constants={"BLOCK": entry["block_columns"]},
                num_warps=entry["num_warps"],
                divisible_by_16=("start", "width"),
            )
        for entry in table["linear_cross_entropy_loss"]:
            for gradient, cap in product((False, True), (False, True)):
                yield _shipped_loss(dtype, entry, gradient, cap, per_row=False)
            yield _shipped_loss(dtype, entry, gradient=True, cap=False, per_row=True)
        for entry in table["linear_cross_entropy_scale"]:
            yield ShippedKernel(
                operator="linear_cross_entropy",
                kernel=scale_kernel,
                dtype=dtype,
                width=entry["max_width"],
                signature={"x": f"*{element}", "factor": "*fp32", "count": "i32"},
                constants={"BLOCK": entry["block_columns"]},
                num_warps=entry["num_warps"],
                divisible_by_16=("count",),
            )
