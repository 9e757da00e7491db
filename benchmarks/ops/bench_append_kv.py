"""append_kv against the eager PyTorch that it replaces, and torch.compile of that."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import Case, cost_per_call_us
from dreamkernels import append_kv
from dreamkernels.ops.append_kv import reference
from dreamkernels.ops.operator import OPERATORS

FAMILY = "language"

# Sequences, new tokens, query heads, key heads: one token of LLaMA-7B, 64 dream queries with their two marks, batches.
SHAPES = {"small": ((1, 1, 32, 32), (1, 66, 32, 32)), "working": ((1, 1, 32, 32), (8, 66, 32, 32), (16, 1, 32, 8))}
WIDTH, POSITIONS = 128, 2048


def inputs(shape: tuple[int, int, int, int], norm: bool, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    batch, tokens, q_heads, kv_heads = shape

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device).to(dtype)

    angle = torch.rand(POSITIONS, WIDTH // 2, device=device).repeat(1, 2)
    cache = torch.zeros(2, batch, POSITIONS // batch, kv_heads, WIDTH, dtype=dtype, device=device)
    lengths = torch.full((batch,), POSITIONS // batch // 2, dtype=torch.int32, device=device)
    new = [normal(batch, tokens, heads, WIDTH) for heads in (q_heads, kv_heads, kv_heads)]
    tables = [angle.cos().to(dtype), angle.sin().to(dtype)]
    return [*new, *cache.unbind(), lengths, *tables, *(torch.ones(WIDTH, device=device, dtype=dtype),) * (2 * norm)]


def ours(*tensors: torch.Tensor) -> torch.Tensor:
    return append_kv(*tensors)


def eager(*tensors: torch.Tensor) -> torch.Tensor:
    return reference.append_kv(*tensors)


def cases(device: str, size: str) -> Iterator[Case]:
    for shape in SHAPES[size]:
        for norm in (False, True):
            torch._dynamo.reset()
            compiled = torch.compile(eager, dynamic=False)
            batch, tokens, q_heads, kv_heads = shape
            elements = batch * tokens * (q_heads + 2 * kv_heads) * WIDTH
            yield Case(
                "append_kv",
                f"forward bfloat16 {list(shape)}{' norm' * norm}",
                lambda shape=shape, norm=norm: inputs(shape, norm, torch.bfloat16, device),
                {"ours": ours, "eager": eager, "torch.compile": compiled},
                2 * elements * 2,
                (10 if norm else 6) * elements,
                2e-2,
                device,
            )


def boundary(device: str) -> dict[str, float]:
    """Microseconds per call for one token of a small model, where the kernel itself costs almost nothing."""
    tensors = inputs((1, 1, 2, 2), False, torch.float32, device)
    return {
        "append_kv": cost_per_call_us(ours, tensors),
        "append_kv, operator alone": cost_per_call_us(
            OPERATORS["append_kv"].overloads["default"], (*tensors, None, None, 1e-6, None)
        ),
        "eager": cost_per_call_us(eager, tensors),
    }
