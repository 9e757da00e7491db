"""splice_embeddings: places image features and dream queries into the token embeddings, by precomputed index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dreamkernels.ops.debug import check_range, debug_enabled
from dreamkernels.ops.operator import FLOAT_DTYPES, Autograd, choose, define, overload_for, row_major_like
from dreamkernels.ops.splice_embeddings import reference

__all__ = ["splice_embeddings"]

_TRITON = "dreamkernels.ops.splice_embeddings.triton"


def _fake_backward(grad, index, source_rows, needed):
    rows = [grad.shape[0], *source_rows]
    return [grad.new_empty(count, grad.shape[1]) for count, wanted in zip(rows, needed, strict=True) if wanted]


BACKWARD = define(
    "splice_embeddings_backward",
    "(Tensor grad, Tensor index, SymInt[] source_rows, bool[] needed) -> Tensor[]",
    fake=_fake_backward,
    triton=f"{_TRITON}:splice_embeddings_backward",
)


def _save(ctx, inputs, output):
    token_embeds, sources, index = inputs
    ctx.save_for_backward(index)
    ctx.source_rows = [source.shape[0] for source in sources]
    ctx.needed = [token_embeds.requires_grad, *(source.requires_grad for source in sources)]


def _backward(backward: Any) -> Callable[..., Any]:
    def run(ctx, grad):
        (index,) = ctx.saved_tensors
        made = iter(backward(grad, index, ctx.source_rows, ctx.needed))
        grad_tokens, *grad_sources = [next(made) if wanted else None for wanted in ctx.needed]
        return grad_tokens, grad_sources, None

    return run


SPLICE_EMBEDDINGS = define(
    "splice_embeddings",
    "(Tensor token_embeds, Tensor[] sources, Tensor index) -> Tensor",
    fake=lambda token_embeds, sources, index: row_major_like(token_embeds),
    triton=f"{_TRITON}:splice_embeddings",
    cuda=True,
    autograd=Autograd(_backward, _save, BACKWARD),
)


def _check(token_embeds: torch.Tensor, sources: Sequence[torch.Tensor], index: torch.Tensor) -> None:
    if token_embeds.dim() != 2:
        raise ValueError(f"token_embeds must be [T, H], not {list(token_embeds.shape)}; flatten the batch first")
    if token_embeds.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"token_embeds has dtype {token_embeds.dtype}, which splice_embeddings does not support "
            "(float32, bfloat16, float16); cast it"
        )
    if index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"index has dtype {index.dtype} (int32 or int64); cast it")
    if index.dim() != 1 or index.shape[0] != token_embeds.shape[0]:
        raise ValueError(f"index {list(index.shape)} must be [{token_embeds.shape[0]}], one entry per token embedding")
    if index.device != token_embeds.device:
        raise ValueError(f"index is on {index.device} but token_embeds is on {token_embeds.device}; move one of them")
    for k, source in enumerate(sources):
        if source.dim() != 2 or source.shape[1] != token_embeds.shape[1]:
            raise ValueError(f"sources[{k}] {list(source.shape)} must be [N, {token_embeds.shape[1]}]")
        if source.dtype != token_embeds.dtype or source.device != token_embeds.device:
            raise ValueError(
                f"sources[{k}] is {source.dtype} on {source.device} but token_embeds is {token_embeds.dtype} on "
                f"{token_embeds.device}; cast or move it"
            )


def splice_embeddings(
    token_embeds: torch.Tensor,
    sources: Sequence[torch.Tensor],
    index: torch.Tensor,
    implementation: str = "auto",
) -> torch.Tensor:
    """Replaces chosen rows of the token embeddings by rows of the sources.

    Number the rows of all sources one after another: row r of sources[k] has the number N_0 + ... + N_(k-1) + r. Then
    out[t] = token_embeds[t] where index[t] = -1, and the source row with number index[t] otherwise. A row may be
    placed at any number of positions, as each dream query is, or at none.

    Args:
        token_embeds: [T, H], float32, bfloat16 or float16.
        sources: tensors [N_k, H], dtype and device of token_embeds; N_k may be zero, and there may be no source.
        index: int32 or int64 [T], each -1 or in [0, N_0 + N_1 + ...). On CPU a value out of range raises; on CUDA it
            is not checked, since that would stop the host: the row is undefined (never out of bounds of memory; it
            keeps the token). Under `dreamkernels.ops.debug.debug_checks()` it raises on every device.
        implementation: "auto" (CPU: C++, CUDA: Triton), or one of "cpu", "triton", "cuda", "reference".

    Returns:
        [T, H], contiguous. One read and one write per row, and no host synchronisation. Differentiable with respect to
        token_embeds (zero at replaced rows) and every source: the gradient of a source row is the sum over the
        positions where it was placed, accumulated in float32 in ascending order, so it is bitwise reproducible.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, the implementation cannot run on the device, or (under debug
            checks) a value of index is out of range.
        RuntimeError: a value of index is out of range (CPU); it is named with its position.
    """
    sources = list(sources)
    _check(token_embeds, sources, index)
    if debug_enabled():
        rows = sum(source.shape[0] for source in sources)
        check_range("splice_embeddings", "index", index, 0, rows, also=-1, meaning=f"there are {rows} source rows")
    chosen = choose(SPLICE_EMBEDDINGS.name, implementation, token_embeds.device.type)
    if chosen == "reference":
        return reference.splice_embeddings(token_embeds, sources, index)
    needs_grad = torch.is_grad_enabled() and (
        token_embeds.requires_grad or any(source.requires_grad for source in sources)
    )
    return overload_for(SPLICE_EMBEDDINGS, chosen, needs_grad)(token_embeds, sources, index)
