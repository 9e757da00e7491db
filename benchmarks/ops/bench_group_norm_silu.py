"""group_norm_silu against F.group_norm and F.silu, torch.compile of them, and Liger-Kernel, in both layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.harness import Case, cost_per_call_us
from dreamkernels import group_norm_silu

FAMILY = "unet"
GROUPS = 32
# Maps of Stable Diffusion's UNet for 8 pictures, and of its VAE for one.
SHAPES = {
    "small": ((2, 320, 32, 32),),
    "working": ((8, 320, 64, 64), (8, 640, 32, 32), (8, 1280, 16, 16), (8, 1280, 8, 8), (1, 128, 512, 512)),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
LAYOUTS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}


def eager(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight, bias))


def ours(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return group_norm_silu(x, GROUPS, weight, bias)


def with_backward(forward: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, grad: torch.Tensor) -> Any:
        y = forward(x, weight, bias)
        return y, *torch.autograd.grad(y, [t for t in (x, weight, bias) if t.requires_grad], grad)

    return run


def cases(device: str, size: str) -> Iterator[Case]:
    """Forward; forward and backward with trained and with frozen parameters (a UNet is usually frozen)."""
    liger = peers.liger_group_norm_silu(device, GROUPS, 1e-5)
    for shape in SHAPES[size]:
        for dtype in (torch.bfloat16, torch.float32):
            for layout, memory_format in LAYOUTS.items():
                torch._dynamo.reset()
                forwards = {"ours": ours, "eager": eager, "torch.compile": torch.compile(eager, dynamic=False)}
                both = {contender: with_backward(call) for contender, call in forwards.items()}
                elements, width = torch.Size(shape).numel(), dtype.itemsize
                name = f"{str(dtype).removeprefix('torch.')} {list(shape)} {layout}"

                def plain(shape=shape, dtype=dtype, memory_format=memory_format) -> list[torch.Tensor]:
                    x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=memory_format)
                    return [x, *torch.rand(2, shape[1], device=device).to(dtype).unbind()]

                def trained(plain=plain) -> list[torch.Tensor]:
                    arguments = [t.clone().requires_grad_() for t in plain()]
                    return [*arguments, torch.randn_like(arguments[0])]

                def frozen(plain=plain) -> list[torch.Tensor]:
                    x, weight, bias = plain()
                    return [x.requires_grad_(), weight, bias, torch.randn_like(x)]

                moved = 2 * elements * width
                more = moved + 3 * elements * width
                for label, make, contenders, other, traffic, flops in (
                    ("forward", plain, forwards, liger, moved, 12 * elements),
                    ("forward+backward", trained, both, peers.wrapped(liger, with_backward), more, 40 * elements),
                    # Its backward gives the gradients of weight and bias whether they are wanted or not.
                    (
                        "forward+backward, frozen", frozen, both, peers.wrapped(liger, with_backward), more,
                        36 * elements,
                    ),
                ):  # fmt: skip
                    yield Case(
                        "group_norm_silu",
                        f"{label} {name}",
                        make,
                        contenders,
                        traffic,
                        flops,
                        TOLERANCE[dtype],
                        device,
                        peers={peers.LIGER: other},
                    )


def boundary(device: str) -> dict[str, float]:
    """Microseconds per call on a [2, 32, 2] tensor, where the kernel itself costs almost nothing."""
    x, weight, bias = torch.randn(2, 32, 2, device=device), torch.ones(32, device=device), torch.ones(32, device=device)
    tracked = x.clone().requires_grad_()
    return {
        "x + x": cost_per_call_us(torch.add, (x, x)),
        "group_norm_silu": cost_per_call_us(ours, (x, weight, bias)),
        "group_norm_silu, recording a gradient": cost_per_call_us(ours, (tracked, weight, bias)),
        "eager": cost_per_call_us(eager, (x, weight, bias)),
    }
