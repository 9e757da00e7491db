"""Stable Diffusion 2.1's UNet, and one of its structure an eighth to a fifth as wide: one call, and with its backward.

Small: channels 64, 128, 256, 256, heads of width 64, 64 keys of width 256 as condition, latents of 32 x 32. Weights are
frozen, as in DreamLLM: the gradient goes to the condition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from benchmarks.harness import Case
from dreamkernels.integrations.diffusers import DiffusersReport, optimize

FAMILY = "models"
KEYS = 64


@dataclass(frozen=True)
class Shape:
    batch: int
    side: int  # of the latents
    channels: tuple[int, ...]
    heads: tuple[int, ...]
    width: int  # of the condition

    def config(self) -> dict[str, Any]:
        return {
            "sample_size": self.side,
            "block_out_channels": self.channels,
            "attention_head_dim": list(self.heads),
            "cross_attention_dim": self.width,
            "use_linear_projection": True,
        }


SHAPES = {
    "small": Shape(4, 32, (64, 128, 256, 256), (1, 2, 4, 4), 256),
    "working": Shape(8, 64, (320, 640, 1280, 1280), (5, 10, 20, 20), 1024),
}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def make_unet(shape: Shape, device: str, dtype: torch.dtype) -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**shape.config()).to(device, dtype).to(memory_format=torch.channels_last)
    return unet.eval().requires_grad_(False)


def make_optimised(
    shape: Shape, device: str, dtype: torch.dtype, frozen: bool
) -> tuple[UNet2DConditionModel, DiffusersReport]:
    unet = make_unet(shape, device, dtype)
    return unet, optimize(unet, frozen=frozen)


def forward(unet: Any, report: DiffusersReport | None = None) -> Callable[..., torch.Tensor]:
    @torch.no_grad()
    def run(latents: torch.Tensor, timestep: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return unet(latents, timestep, condition if report is None else report.condition(condition)).sample

    return run


def with_backward(unet: Any, report: DiffusersReport | None = None) -> Callable[..., Any]:
    def run(latents: torch.Tensor, timestep: torch.Tensor, condition: torch.Tensor) -> Any:
        condition = condition.clone().requires_grad_()
        sample = unet(latents, timestep, condition if report is None else report.condition(condition)).sample
        return sample, *torch.autograd.grad(sample, condition, latents)

    return run


def cases(device: str, size: str) -> Iterator[Case]:
    shape = SHAPES[size]
    for dtype in (torch.bfloat16, torch.float32):
        torch._dynamo.reset()
        unet = make_unet(shape, device, dtype)
        prepared, report = make_optimised(shape, device, dtype, frozen=True)
        changeable, _ = make_optimised(shape, device, dtype, frozen=False)
        parameters = sum(p.numel() for p in unet.parameters())

        def make_inputs(dtype: torch.dtype = dtype) -> list[torch.Tensor]:
            latents = torch.randn(shape.batch, 4, shape.side, shape.side, device=device).to(dtype)
            times = torch.randint(0, 1000, (shape.batch,), device=device)
            condition = torch.randn(shape.batch, KEYS, shape.width, device=device).to(dtype)
            return [latents.contiguous(memory_format=torch.channels_last), times, condition]

        for label, make in (("forward", forward), ("forward+backward", with_backward)):
            contenders = {
                "optimize(frozen=True)": make(prepared, report),
                "eager channels-last": make(unet),
                "optimize()": make(changeable),
            }
            if label == "forward":
                contenders["torch.compile"] = make(torch.compile(make_unet(shape, device, dtype), dynamic=False))
            yield Case(
                "diffusion_unet",
                f"{label} {str(dtype).removeprefix('torch.')}, {shape.batch} latents of {shape.side} x {shape.side}, "
                f"{parameters / 1e6:.0f} million parameters",
                make_inputs,
                contenders,
                bytes_moved=parameters * dtype.itemsize,
                flops=0,
                relative_tolerance=TOLERANCE[dtype],
                device=device,
                samples=shape.batch,
                fallible=("torch.compile",),
            )


def boundary(device: str) -> dict[str, float]:
    return {}
