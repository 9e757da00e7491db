"""cross_conditioning against SDPA and torch.compile, and whole layers with a folded condition against unfolded ones.

Shapes are those of SD 2.1's cross-attention at 512 pixels: positions, heads of width 64, 64 dream queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.harness import Case, cost_per_call_us
from dreamkernels import (
    ConditionLayer,
    DreamCondition,
    cross_conditioning,
    fold_condition,
    folded_cross_conditioning,
)
from dreamkernels.ops.operator import OPERATORS

FAMILY = "conditioning"
KEYS, WIDTH = 64, 64
LAYERS = ((4096, 5), (1024, 10), (256, 20))
PICTURES = 2  # guided and unguided
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return cross_conditioning(q, k, v)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What diffusers runs."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = torch.softmax(q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * q.shape[-1] ** -0.5, -1)
    return (weights @ v.transpose(1, 2)).transpose(1, 2)


def with_backward(forward: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def run(grad: torch.Tensor, *inputs: torch.Tensor) -> Any:
        y = forward(*inputs)
        return y, *torch.autograd.grad(y, inputs, grad)

    return run


def cases(device: str) -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        for positions, heads in LAYERS:
            yield from _attention(device, positions, heads, dtype)
            yield _layer(device, positions, heads, dtype)


def _attention(device: str, positions: int, heads: int, dtype: torch.dtype) -> Iterator[Case]:
    torch._dynamo.reset()

    def random(length: int) -> torch.Tensor:
        return torch.randn(PICTURES, length, heads, WIDTH, device=device).to(dtype)

    def plain() -> list[torch.Tensor]:
        return [random(positions), random(KEYS), random(KEYS)]

    def differentiable() -> list[torch.Tensor]:
        return [random(positions), *(x.requires_grad_() for x in plain())]

    forwards = {"ours": ours, "SDPA": sdpa, "eager": eager, "torch.compile": torch.compile(eager, dynamic=False)}
    name = f"{str(dtype).removeprefix('torch.')} [{PICTURES}, {positions}, {heads}, {WIDTH}] to {KEYS} keys"
    rows = PICTURES * positions * heads
    moved, flops = 2 * rows * WIDTH * dtype.itemsize, 4 * rows * KEYS * WIDTH
    fallible = ("torch.compile",)  # torch 2.13 takes these heads for another pattern of attention, and fails
    yield Case(
        "cross_conditioning",
        f"forward {name}",
        plain,
        forwards,
        moved,
        flops,
        TOLERANCE[dtype],
        device,
        fallible=fallible,
    )
    both = {contender: with_backward(call) for contender, call in forwards.items()}
    moved += 3 * rows * WIDTH * dtype.itemsize
    label = f"forward+backward {name}"
    yield Case(
        "cross_conditioning",
        label,
        differentiable,
        both,
        moved,
        14 * rows * KEYS * WIDTH,
        TOLERANCE[dtype],
        device,
        fallible=fallible,
    )


def _layer(device: str, positions: int, heads: int, dtype: torch.dtype) -> Case:
    """Query projection, attention, output projection and residual; the condition is the same in every step."""
    channels = heads * WIDTH

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    weight_q, weight_out = (random(channels, channels) * channels**-0.5 for _ in range(2))
    bias = random(channels)
    condition = DreamCondition(random(PICTURES, KEYS, 2 * channels), (ConditionLayer(heads, WIDTH),))
    folded = fold_condition(condition, 0, weight_q, weight_out, bias)

    def fold(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return folded_cross_conditioning(x, folded, residual)

    def unfolded(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        q = F.linear(x, weight_q).unflatten(-1, (heads, WIDTH))
        return F.linear(condition.attend(0, q).flatten(2), weight_out, bias) + residual

    def with_sdpa(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        q = F.linear(x, weight_q).unflatten(-1, (heads, WIDTH))
        return F.linear(sdpa(q, *condition.key_value(0)).flatten(2), weight_out, bias) + residual

    def inputs() -> list[torch.Tensor]:
        return [random(PICTURES, positions, channels), random(PICTURES, positions, channels)]

    rows = PICTURES * positions
    return Case(
        "folded_cross_conditioning",
        f"layer {str(dtype).removeprefix('torch.')} [{PICTURES}, {positions}, {channels}]",
        inputs,
        {"folded": fold, "unfolded": unfolded, "SDPA": with_sdpa},
        3 * rows * channels * dtype.itemsize,
        4 * rows * channels * heads * KEYS,
        TOLERANCE[dtype],
        device,
    )


def boundary(device: str) -> dict[str, float]:
    """Microseconds per call on tiny tensors, where the kernel itself costs almost nothing."""
    q, k = (torch.randn(1, 2, 1, 16, device=device) for _ in range(2))
    tracked = q.clone().requires_grad_()
    overload = OPERATORS["cross_conditioning"].overloads["inference"]
    return {
        "x + x": cost_per_call_us(torch.add, (q, q)),
        "cross_conditioning": cost_per_call_us(ours, (q, k, k)),
        "cross_conditioning, operator alone": cost_per_call_us(overload, (q, k, k, 0.25)),
        "cross_conditioning, recording a gradient": cost_per_call_us(ours, (tracked, k, k)),
        "SDPA": cost_per_call_us(sdpa, (q, k, k)),
        "SDPA, recording a gradient": cost_per_call_us(sdpa, (tracked, k, k)),
    }
