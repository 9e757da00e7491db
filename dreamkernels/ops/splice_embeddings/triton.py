"""GPU kernels of splice_embeddings.

Forward: program (t, c) copies columns [c * BLOCK, (c + 1) * BLOCK) of row t from where index[t] says. The sources are
separate tensors; a launch takes SOURCES_PER_LAUNCH of them and writes the rows that come from those (the first launch
also the kept tokens), so every row is read once and written once whatever the number of sources.

Backward: positions are sorted by source row (stable, so ascending within a row); program (r, c) then adds the
gradients of the positions of source row r in that order. No atomics: results repeat bit for bit, and nothing is read
back by the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from dreamkernels.devices import architecture_of, launch_parameters, load_device
from dreamkernels.ops.launch import LAUNCH_OPTIONS, TRITON_DTYPES, ShippedKernel, on_device_of

SOURCES_PER_LAUNCH = 4
# Row counts differ from batch to batch; specialising on them would compile again and again.
_ROW_COUNTS = ["start0", "start1", "start2", "start3", "end", "total"]


@triton.jit
def _copy(source, row, out, t, width, column):
    tl.store(out + t * width + column, tl.load(source + row * width + column, column < width), column < width)


@triton.jit(do_not_specialize=_ROW_COUNTS)
def forward_kernel(
    tokens,
    source0,
    source1,
    source2,
    source3,
    index,
    out,
    width,
    start0,
    start1,
    start2,
    start3,
    end,
    total,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(index + t).to(tl.int64)
    if (row < 0) | (row >= total):
        if TOKENS:
            _copy(tokens, t, out, t, width, column)
    elif (row >= start0) & (row < end):
        if row < start1:
            _copy(source0, row - start0, out, t, width, column)
        elif row < start2:
            _copy(source1, row - start1, out, t, width, column)
        elif row < start3:
            _copy(source2, row - start2, out, t, width, column)
        else:
            _copy(source3, row - start3, out, t, width, column)


@triton.jit
def token_grad_kernel(grad, index, out, width, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    kept = tl.where(tl.load(index + t) < 0, width, 0)  # columns of this row that pass the gradient on: all or none
    values = tl.load(grad + t * width + column, column < kept, other=0.0)
    tl.store(out + t * width + column, values, column < width)


@triton.jit
def gather_sum_kernel(grad, starts, positions, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(tl.load(starts + row), tl.load(starts + row + 1)):
        t = tl.load(positions + k)
        total += tl.load(grad + t * width + column, inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, total.to(out.dtype.element_ty), inside)


def _launch(x: torch.Tensor, kernel: str) -> dict[str, int]:
    return launch_parameters(architecture_of(x.device), f"splice_embeddings_{kernel}", x.shape[1])


def splice_embeddings(token_embeds: torch.Tensor, sources: Sequence[torch.Tensor], index: torch.Tensor) -> torch.Tensor:
    token_embeds, index = token_embeds.contiguous(), index.contiguous()
    out = torch.empty_like(token_embeds)
    if not token_embeds.numel():
        return out
    length, width = token_embeds.shape
    starts = [0]
    for source in sources:
        starts.append(starts[-1] + source.shape[0])
    launch = _launch(token_embeds, "forward")
    grid = (length, triton.cdiv(width, launch["block_columns"]))
    with on_device_of(token_embeds):
        for first in range(0, max(len(sources), 1), SOURCES_PER_LAUNCH):
            group = [source.contiguous() for source in sources[first : first + SOURCES_PER_LAUNCH]]
            group_starts = starts[first : first + len(group)]
            end = starts[first + len(group)]
            absent = SOURCES_PER_LAUNCH - len(group)
            forward_kernel[grid](
                token_embeds,
                *group,
                *[token_embeds] * absent,
                index,
                out,
                width,
                *group_starts,
                *[end] * absent,
                end,
                starts[-1],
                TOKENS=first == 0,
                BLOCK=launch["block_columns"],
                num_warps=launch["num_warps"],
                **LAUNCH_OPTIONS,
            )
    return out


def _token_gradient(grad: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(grad)
    if grad.numel():
        launch = _launch(grad, "token_grad")
        grid = (grad.shape[0], triton.cdiv(grad.shape[1], launch["block_columns"]))
        block = launch["block_columns"]
        token_grad_kernel[grid](
            grad, index, out, grad.shape[1], BLOCK=block, num_warps=launch["num_warps"], **LAUNCH_OPTIONS
        )
    return out


def splice_embeddings_backward(
    grad: torch.Tensor, index: torch.Tensor, source_rows: Sequence[int], needed: Sequence[bool]
) -> list[torch.Tensor]:
    grad, index = grad.contiguous(), index.contiguous()
    width = grad.shape[1]
    gradients = []
    with on_device_of(grad):
        if needed[0]:
            gradients.append(_token_gradient(grad, index))
        if not any(needed[1:]):
            return gradients
        ordered, positions = torch.sort(index, stable=True)
        rows = torch.arange(sum(source_rows) + 1, device=index.device, dtype=index.dtype)
        starts = torch.searchsorted(ordered, rows)
        launch = _launch(grad, "gather_sum")
        first = 0
        for count, wanted in zip(source_rows, needed[1:], strict=True):
            if wanted:
                out = grad.new_empty(count, width)
                if out.numel():
                    gather_sum_kernel[(count, triton.cdiv(width, launch["block_columns"]))](
                        grad,
                        starts[first:],
                        positions,
                        out,
                        width,
                        BLOCK=launch["block_columns"],
                        num_warps=launch["num_warps"],
                        **LAUNCH_OPTIONS,
                    )
                gradients.append(out)
            first += count
    return gradients


def shipped_kernels(architecture: str) -> Iterator[ShippedKernel]:
    """Every kernel at every launch parameter of an architecture, at the widest row that each entry serves."""
    table = load_device(architecture).launch
    for dtype, element in TRITON_DTYPES.items():
        pointer = f"*{element}"
        copies = {"tokens": pointer, **{f"source{k}": pointer for k in range(SOURCES_PER_LAUNCH)}}
        signatures = {
            "forward": (
                forward_kernel,
                {**copies, "index": "*i64", "out": pointer, "width": "i32", **dict.fromkeys(_ROW_COUNTS, "i32")},
                {"TOKENS": True},
            ),
            "token_grad": (token_grad_kernel, {"grad": pointer, "index": "*i64", "out": pointer, "width": "i32"}, {}),
            "gather_sum": (
                gather_sum_kernel,
                {"grad": pointer, "starts": "*i64", "positions": "*i64", "out": pointer, "width": "i32"},
                {},
            ),
        }
        for kernel, (function, signature, constants) in signatures.items():
            for entry in table[f"splice_embeddings_{kernel}"]:
                yield ShippedKernel(
                    operator=f"splice_embeddings{'' if kernel == 'forward' else '_backward'}",
                    kernel=function,
                    dtype=dtype,
                    width=entry["max_width"],
                    signature=signature,
                    constants={**constants, "BLOCK": entry["block_columns"]},
                    num_warps=entry["num_warps"],
                    divisible_by_16=("width",),
                )
