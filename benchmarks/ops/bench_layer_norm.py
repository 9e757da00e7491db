"""layer_norm against F.layer_norm, torch.compile of it, and Liger-Kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.harness import Case, cost_per_call_us
from dreamkernels import layer_norm
from dreamkernels.ops.operator import OPERATORS

FAMILY = "unet"
# Positions of 8 maps and widths of Stable Diffusion's UNet; 16 pictures in CLIP ViT-L/14 (257 tokens of width 1024).
SHAPES = {"small": ((2048, 320),), "working": ((32768, 320), (8192, 640), (2048, 1280), (4112, 1024))}
# F.layer_norm adds up the gradients of a bfloat16 weight and bias in bfloat16: 6e-2 from the exact ones, ours 3e-3.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-1}


def eager(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, weight.shape, weight, bias)


def with_backward(forward: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, grad: torch.Tensor) -> Any:
        y = forward(x, weight, bias)
        return y, *torch.autograd.grad(y, (x, weight, bias), grad)

    return run


def cases(device: str, size: str) -> Iterator[Case]:
    liger = peers.liger_layer_norm(device, 1e-5)
    for shape in SHAPES[size]:
        for dtype in (torch.bfloat16, torch.float32):
            torch._dynamo.reset()
            forwards = {"ours": layer_norm, "F.layer_norm": eager, "torch.compile": torch.compile(eager, dynamic=False)}
            elements, width = shape[0] * shape[1], dtype.itemsize
            name = f"{str(dtype).removeprefix('torch.')} {list(shape)}"

            def plain(shape=shape, dtype=dtype) -> list[torch.Tensor]:
                x = torch.randn(shape, device=device).to(dtype)
                return [x, *torch.rand(2, shape[1], device=device).to(dtype).unbind()]

            def differentiable(plain=plain) -> list[torch.Tensor]:
                arguments = [t.clone().requires_grad_() for t in plain()]
                return [*arguments, torch.randn_like(arguments[0])]

            yield Case(
                "layer_norm",
                f"forward {name}",
                plain,
                forwards,
                2 * elements * width,
                7 * elements,
                TOLERANCE[dtype],
                device,
                peers={peers.LIGER: liger},
            )
            yield Case(
                "layer_norm",
                f"forward+backward {name}",
                differentiable,
                {contender: with_backward(call) for contender, call in forwards.items()},
                (2 + 3) * elements * width,
                25 * elements,
                TOLERANCE[dtype],
                device,
                peers={peers.LIGER: peers.wrapped(liger, with_backward)},
            )


def boundary(device: str) -> dict[str, float]:
    """Microseconds per call on a [2, 64] tensor, where the kernel itself costs almost nothing."""
    x, weight, bias = torch.randn(2, 64, device=device), torch.ones(64, device=device), torch.ones(64, device=device)
    tracked = x.clone().requires_grad_()
    return {
        "x + x": cost_per_call_us(torch.add, (x, x)),
        "layer_norm": cost_per_call_us(layer_norm, (x, weight, bias)),
        "layer_norm, operator alone": cost_per_call_us(
            OPERATORS["layer_norm"].overloads["inference"], (x, weight, bias, 1e-5)
        ),
        "layer_norm, recording a gradient": cost_per_call_us(layer_norm, (tracked, weight, bias)),
        "F.layer_norm": cost_per_call_us(eager, (x, weight, bias)),
    }
