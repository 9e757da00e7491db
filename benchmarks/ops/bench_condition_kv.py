"""Keys and values of all cross-attention layers: once per picture, against projections in each of 25 denoising steps.

Working size is SD 2.1's: 16 layers, 24,960 columns, conditions of 64 states of width 1024.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.harness import Case, cost_per_call_us
from dreamkernels import ConditionWeights, condition_kv

FAMILY = "conditioning"
STEPS, HEAD_WIDTH = 25, 64
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Shape:
    """Heads of each layer; states per condition, their width and that of the condition; numbers of conditions."""

    heads: tuple[int, ...]
    keys: int
    state_width: int
    condition_width: int
    pictures: tuple[int, ...]


SHAPES = {
    "small": Shape((1,) * 5 + (2,) * 5 + (4,) * 6, 64, 512, 256, (1,)),
    "working": Shape((5,) * 5 + (10,) * 5 + (20,) * 6, 64, 4096, 1024, (2, 16)),
}


def cases(device: str, size: str) -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        yield from _cases(device, SHAPES[size], dtype)


def _cases(device: str, shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    pairs = [[random(heads * HEAD_WIDTH, shape.condition_width) for _ in range(2)] for heads in shape.heads]
    weights = ConditionWeights.concatenate((*pair, heads) for pair, heads in zip(pairs, shape.heads, strict=True))
    singles = [weight for pair in pairs for weight in pair]
    projector = random(shape.condition_width, shape.state_width) * shape.state_width**-0.5

    def grouped(states: torch.Tensor) -> torch.Tensor:
        return condition_kv(states, weights, projector).columns

    def layers(states: torch.Tensor) -> torch.Tensor:
        condition = F.linear(states, projector)
        return torch.cat([F.linear(condition, weight) for weight in singles], -1)

    def every_step(states: torch.Tensor) -> torch.Tensor:
        """What a UNet does that is given the condition: every layer projects it, in every step."""
        condition = F.linear(states, projector)
        for _ in range(STEPS):
            projected = [F.linear(condition, weight) for weight in singles]
        return torch.cat(projected, -1)

    def backward(call):
        def run(grad: torch.Tensor, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(call(states), states, grad)

        return run

    columns = weights.weight.shape[0]
    for pictures in shape.pictures:
        rows = pictures * shape.keys
        moved = (weights.weight.numel() + projector.numel() + rows * (shape.state_width + columns)) * dtype.itemsize
        flops = 2 * rows * shape.condition_width * (shape.state_width + columns)
        name = f"{str(dtype).removeprefix('torch.')} [{pictures}, {shape.keys}, {shape.state_width}]"

        def states(pictures=pictures) -> list[torch.Tensor]:
            return [random(pictures, shape.keys, shape.state_width)]

        def differentiable(pictures=pictures) -> list[torch.Tensor]:
            return [
                random(pictures, shape.keys, columns),
                random(pictures, shape.keys, shape.state_width).requires_grad_(),
            ]

        yield Case(
            "condition_kv",
            f"{STEPS} steps {name}",
            states,
            {"ours": grouped, "one product per layer": layers, "in every step": every_step},
            moved,
            flops,
            TOLERANCE[dtype],
            device,
        )
        yield Case(
            "condition_kv",
            f"forward+backward {name}",
            differentiable,
            {"ours": backward(grouped), "one product per layer": backward(layers)},
            2 * moved,
            2 * flops,
            TOLERANCE[dtype],
            device,
        )


def boundary(device: str) -> dict[str, float]:
    """Microseconds per call with two tiny layers; the products cost almost nothing."""
    weights = ConditionWeights.concatenate(
        [(torch.randn(4, 8, device=device), torch.randn(4, 8, device=device), 1)] * 2
    )
    states = torch.randn(1, 2, 8, device=device)
    return {
        "condition_kv": cost_per_call_us(lambda s: condition_kv(s, weights), (states,)),
        "F.linear": cost_per_call_us(F.linear, (states, weights.weight)),
    }
