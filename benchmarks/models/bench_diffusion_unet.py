"""A UNet with Stable Diffusion 2.1's structure, an eighth to a fifth as wide: one call, and a call with its backward.

Channels 64, 128, 256, 256, heads of width 64, 64 keys of width 256 as condition, latents of 32 x 32. Weights are
frozen, as in DreamLLM: the gradient goes to the condition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from benchmarks.harness import Case
from dreamkernels.integrations.diffusers import DiffusersReport, optimize

FAMILY = "unet"
BATCH, SIDE, KEYS, WIDTH = 4, 32, 64, 256
CONFIG = {
    "sample_size": SIDE,
    "block_out_channels": (64, 128, 256, 256),
    "attention_head_dim": [1, 2, 4, 4],
    "cross_attention_dim": WIDTH,
    "use_linear_projection": True,
}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def make_unet(device: str, dtype: torch.dtype) -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**CONFIG).to(device, dtype).to(memory_format=torch.channels_last)
    return unet.eval().requires_grad_(False)


def make_optimised(device: str, dtype: torch.dtype, frozen: bool) -> tuple[UNet2DConditionModel, DiffusersReport]:
    unet = make_unet(device, dtype)
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


def cases(device: str) -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        torch._dynamo.reset()
        unet = make_unet(device, dtype)
        prepared, report = make_optimised(device, dtype, frozen=True)
        changeable, _ = make_optimised(device, dtype, frozen=False)
        parameters = sum(p.numel() for p in unet.parameters())

        def make_inputs(dtype: torch.dtype = dtype) -> list[torch.Tensor]:
            latents = torch.randn(BATCH, 4, SIDE, SIDE, device=device).to(dtype)
            times = torch.randint(0, 1000, (BATCH,), device=device)
            condition = torch.randn(BATCH, KEYS, WIDTH, device=device).to(dtype)
            return [latents.contiguous(memory_format=torch.channels_last), times, condition]

        for label, make in (("forward", forward), ("forward+backward", with_backward)):
            contenders = {
                "optimize(frozen=True)": make(prepared, report),
                "eager channels-last": make(unet),
                "optimize()": make(changeable),
            }
            if label == "forward":
                contenders["torch.compile"] = make(torch.compile(make_unet(device, dtype), dynamic=False))
            yield Case(
                "diffusion_unet",
                f"{label} {str(dtype).removeprefix('torch.')}, {BATCH} latents of {SIDE} x {SIDE}, "
                f"{parameters / 1e6:.0f} million parameters",
                make_inputs,
                contenders,
                bytes_moved=parameters * dtype.itemsize,
                flops=0,
                relative_tolerance=TOLERANCE[dtype],
                device=device,
                samples=BATCH,
                fallible=("torch.compile",),
            )


def boundary(device: str) -> dict[str, float]:
    return {}
