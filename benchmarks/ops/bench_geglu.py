"""geglu against eager PyTorch, torch.compile of it, diffusers' module and Liger-Kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.harness import Case, cost_per_call_us
from dreamkernels import geglu
from dreamkernels.ops.operator import OPERATORS

FAMILY = "unet"
# Packed projections of Stable Diffusion's UNet: widths 320, 640 and 1280, positions of 8 maps.
SHAPES = {"small": ((1024, 2560),), "working": ((32768, 2560), (8192, 5120), (2048, 10240))}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def eager(x: torch.Tensor) -> torch.Tensor:
    hidden, gate = x.chunk(2, dim=-1)
    return hidden * F.gelu(gate)


def with_backward(forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    def run(x: torch.Tensor, grad: torch.Tensor) -> Any:
        y = forward(x)
        return y, *torch.autograd.grad(y, x, grad)

    return run


def cases(device: str, size: str) -> Iterator[Case]:
    others = {peers.DIFFUSERS: peers.diffusers_geglu(device), peers.LIGER: peers.liger_geglu(device)}
    for shape in SHAPES[size]:
        for dtype in (torch.bfloat16, torch.float32):
            torch._dynamo.reset()
            forwards = {"ours": geglu, "eager": eager, "torch.compile": torch.compile(eager, dynamic=False)}
            outputs, width = shape[0] * shape[1] // 2, dtype.itemsize
            name = f"{str(dtype).removeprefix('torch.')} {list(shape)}"

            def plain(shape=shape, dtype=dtype) -> list[torch.Tensor]:
                return [torch.randn(shape, device=device).to(dtype)]

            def differentiable(plain=plain) -> list[torch.Tensor]:
                (x,) = plain()
                return [x.requires_grad_(), torch.randn_like(x[:, ::2].contiguous())]

            yield Case(
                "geglu",
                f"forward {name}",
                plain,
                forwards,
                3 * outputs * width,
                30 * outputs,
                TOLERANCE[dtype],
                device,
                peers=others,
            )
            yield Case(
                "geglu",
                f"forward+backward {name}",
                differentiable,
                {contender: with_backward(call) for contender, call in forwards.items()},
                (3 + 5) * outputs * width,
                70 * outputs,
                TOLERANCE[dtype],
                device,
                peers={name: peers.wrapped(call, with_backward) for name, call in others.items()},
            )


def boundary(device: str) -> dict[str, float]:
    """Microseconds per call on a [2, 64] tensor, where the kernel itself costs almost nothing."""
    x = torch.randn(2, 64, device=device)
    tracked = x.clone().requires_grad_()
    return {
        "x + x": cost_per_call_us(torch.add, (x, x)),
        "geglu": cost_per_call_us(geglu, (x,)),
        "geglu, operator alone": cost_per_call_us(OPERATORS["geglu"].overloads["inference"], (x,)),
        "geglu, recording a gradient": cost_per_call_us(geglu, (tracked,)),
        "eager": cost_per_call_us(eager, (x,)),
    }
