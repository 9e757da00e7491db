"""swiglu against eager PyTorch, torch.compile and Liger-Kernel, on two tensors and on a packed one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.harness import Case, cost_per_call_us
from dreamkernels import swiglu, swiglu_packed
from dreamkernels.ops.operator import OPERATORS

FAMILY = "language"
SHAPES = {"small": ((2048, 1024),), "working": ((8192, 11008), (16384, 11008))}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def eager(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def eager_packed(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def ours(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return swiglu(gate, up)


def ours_packed(gate_up: torch.Tensor) -> torch.Tensor:
    return swiglu_packed(gate_up)


def with_backward(forward: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def run(grad: torch.Tensor, *inputs: torch.Tensor) -> Any:
        y = forward(*inputs)
        return y, *torch.autograd.grad(y, inputs, grad)

    return run


def cases(device: str, size: str) -> Iterator[Case]:
    for packed in (False, True):
        for shape in SHAPES[size]:
            for dtype in (torch.bfloat16, torch.float32):
                yield from _cases(device, packed, shape, dtype)


def _cases(device: str, packed: bool, shape: tuple[int, int], dtype: torch.dtype) -> Iterator[Case]:
    torch._dynamo.reset()
    definition = eager_packed if packed else eager
    forwards = {
        "ours": ours_packed if packed else ours,
        "eager": definition,
        "torch.compile": torch.compile(definition, dynamic=False),
    }
    liger = peers.liger_swiglu(device)
    if packed:
        liger = peers.wrapped(liger, lambda call: lambda gate_up: call(*gate_up.chunk(2, -1)))
    rows, width = shape

    def random(columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, device=device).to(dtype)

    def plain() -> list[torch.Tensor]:
        return [random(2 * width)] if packed else [random(width), random(width)]

    def differentiable() -> list[torch.Tensor]:
        return [random(width), *(x.requires_grad_() for x in plain())]

    operator = "swiglu_packed" if packed else "swiglu"
    name = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
    elements = rows * width
    moved, flops = 3 * elements * dtype.itemsize, 5 * elements
    others = {peers.LIGER: liger}
    yield Case(operator, f"forward {name}", plain, forwards, moved, flops, TOLERANCE[dtype], device, peers=others)
    both = {contender: with_backward(call) for contender, call in forwards.items()}
    moved += 5 * elements * dtype.itemsize
    label = f"forward+backward {name}"
    others = {peers.LIGER: peers.wrapped(liger, with_backward)}
    yield Case(operator, label, differentiable, both, moved, 15 * elements, TOLERANCE[dtype], device, peers=others)


def boundary(device: str) -> dict[str, float]:
    """Microseconds per call on a [2, 64] tensor, where the kernel itself costs almost nothing."""
    x = torch.randn(2, 64, device=device)
    tracked = x.clone().requires_grad_()
    return {
        "x + x": cost_per_call_us(torch.add, (x, x)),
        "swiglu": cost_per_call_us(ours, (x, x)),
        "swiglu, operator alone": cost_per_call_us(OPERATORS["swiglu"].overloads["inference"], (x, x)),
        "swiglu, recording a gradient": cost_per_call_us(ours, (tracked, x)),
        "swiglu_packed": cost_per_call_us(ours_packed, (x,)),
        "eager": cost_per_call_us(eager, (x, x)),
        "eager, recording a gradient": cost_per_call_us(eager, (tracked, x)),
    }
