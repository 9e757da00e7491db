"""cross_conditioning against SDPA, torch.compile, flash-attn and xformers, and layers with a folded condition.

Shapes are those of SD 2.1's cross-attention at 512 pixels: heads of width 64, 64 dream queries of width 1024.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import peers
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
KEYS, WIDTH, CONDITION_WIDTH = 64, 64, 1024
# Conditions (guided and unguided), positions, heads.
SHAPES = {"small": ((2, 1024, 5),), "working": ((16, 4096, 5), (16, 1024, 10), (16, 256, 20))}
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


def cases(device: str, size: str) -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        for shape in SHAPES[size]:
            yield from _attention(device, *shape, dtype)
            yield _layer(device, *shape, dtype)


def _attention(device: str, pictures: int, positions: int, heads: int, dtype: torch.dtype) -> Iterator[Case]:
    torch._dynamo.reset()

    def random(length: int) -> torch.Tensor:
        return torch.randn(pictures, length, heads, WIDTH, device=device).to(dtype)

    def plain() -> list[torch.Tensor]:
        return [random(positions), random(KEYS), random(KEYS)]

    def differentiable() -> list[torch.Tensor]:
        return [random(positions), *(x.requires_grad_() for x in plain())]

    forwards = {"ours": ours, "SDPA": sdpa, "eager": eager, "torch.compile": torch.compile(eager, dynamic=False)}
    name = f"{str(dtype).removeprefix('torch.')} [{pictures}, {positions}, {heads}, {WIDTH}] to {KEYS} keys"
    rows = pictures * positions * heads
    moved, flops = 2 * rows * WIDTH * dtype.itemsize, 4 * rows * KEYS * WIDTH
    flash, xformers = peers.flash_attention(device, dtype, False), peers.xformers_attention(device, False)
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
        peers={peers.FLASH: flash, peers.XFORMERS: xformers},
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
        peers={
            peers.FLASH: peers.wrapped(flash, with_backward),
            peers.XFORMERS: peers.wrapped(xformers, with_backward),
        },
    )


def _layer(device: str, pictures: int, positions: int, heads: int, dtype: torch.dtype) -> Case:
    """Query projection, attention, output projection and residual; the condition is the same in every step."""
    channels = heads * WIDTH

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    weight_q, weight_out = (random(channels, channels) * channels**-0.5 for _ in range(2))
    weight_k, weight_v = (random(channels, CONDITION_WIDTH) * CONDITION_WIDTH**-0.5 for _ in range(2))
    bias = random(channels)
    states = random(pictures, KEYS, CONDITION_WIDTH)
    columns = torch.cat([F.linear(states, weight_k), F.linear(states, weight_v)], -1)
    condition = DreamCondition(columns, (ConditionLayer(heads, WIDTH),))
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
        return [random(pictures, positions, channels), random(pictures, positions, channels)]

    rows = pictures * positions
    return Case(
        "folded_cross_conditioning",
        f"layer {str(dtype).removeprefix('torch.')} [{pictures}, {positions}, {channels}]",
        inputs,
        {"folded": fold, "unfolded": unfolded, "SDPA": with_sdpa},
        3 * rows * channels * dtype.itemsize,
        4 * rows * channels * heads * KEYS,
        TOLERANCE[dtype],
        device,
        peers={
            peers.DIFFUSERS: peers.diffusers_cross_attention(
                device, dtype, heads, WIDTH, (weight_q, weight_k, weight_v, weight_out, bias), states
            )
        },
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
