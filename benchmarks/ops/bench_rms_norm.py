"""rms_norm against eager LLaMA code, torch's F.rms_norm, torch.compile and Liger-Kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.harness import Case, cost_per_call_us
from dreamkernels import rms_norm
from dreamkernels.ops.operator import OPERATORS

FAMILY = "language"
SHAPES = {"small": ((2048, 1024),), "working": ((8192, 4096), (16384, 4096))}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def eager(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What LLaMA in transformers computes."""
    wide = x.float()
    variance = wide.pow(2).mean(-1, keepdim=True)
    return weight * (wide * torch.rsqrt(variance + 1e-6)).to(x.dtype)


def torch_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-6)


def ours(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, weight, 1e-6)


def with_backward(forward: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def run(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> Any:
        y = forward(x, weight)
        return y, *torch.autograd.grad(y, (x, weight), grad)

    return run


def cases(device: str, size: str) -> Iterator[Case]:
    liger = peers.liger_rms_norm(device, 1e-6)
    for shape in SHAPES[size]:
        for dtype in (torch.bfloat16, torch.float32):
            # Compiled per shape: torch.compile at its best, not its shape-generic form.
            torch._dynamo.reset()
            forwards = {
                "ours": ours,
                "eager": eager,
                "F.rms_norm": torch_rms_norm,
                "torch.compile": torch.compile(eager, dynamic=False),
            }
            elements, width = shape[0] * shape[1], dtype.itemsize
            name = f"{str(dtype).removeprefix('torch.')} {list(shape)}"

            def plain(shape=shape, dtype=dtype) -> list[torch.Tensor]:
                return [torch.randn(shape, device=device).to(dtype), torch.rand(shape[1], device=device).to(dtype)]

            def differentiable(plain=plain) -> list[torch.Tensor]:
                x, weight = plain()
                return [x.requires_grad_(), weight.requires_grad_(), torch.randn_like(x)]

            yield Case(
                "rms_norm",
                f"forward {name}",
                plain,
                forwards,
                2 * elements * width,
                4 * elements,
                TOLERANCE[dtype],
                device,
                peers={peers.LIGER: liger},
            )
            both = {contender: with_backward(call) for contender, call in forwards.items()}
            moved = (2 + 3) * elements * width
            yield Case(
                "rms_norm",
                f"forward+backward {name}",
                differentiable,
                both,
                moved,
                14 * elements,
                TOLERANCE[dtype],
                device,
                peers={peers.LIGER: peers.wrapped(liger, with_backward)},
            )


def boundary(device: str) -> dict[str, float]:
    """Microseconds per call on a [2, 64] tensor, where the kernel itself costs almost nothing."""
    x, weight = torch.randn(2, 64, device=device), torch.ones(64, device=device)
    tracked = x.clone().requires_grad_()
    return {
        "x + x": cost_per_call_us(torch.add, (x, x)),
        "rms_norm": cost_per_call_us(ours, (x, weight)),
        "rms_norm, operator alone": cost_per_call_us(OPERATORS["rms_norm"].overloads["inference"], (x, weight, 1e-6)),
        "rms_norm, recording a gradient": cost_per_call_us(ours, (tracked, weight)),
        "F.rms_norm": cost_per_call_us(torch_rms_norm, (x, weight)),
        "F.rms_norm, recording a gradient": cost_per_call_us(torch_rms_norm, (tracked, weight)),
        "eager": cost_per_call_us(eager, (x, weight)),
    }
