"""guided_step against guidance and step of diffusers, as its pipelines call them, and against torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from benchmarks.harness import Case, cost_per_call_us
from dreamkernels import guided_step, step_schedule
from dreamkernels.ops.guided_step import reference
from dreamkernels.ops.operator import OPERATORS

FAMILY = "unet"
SHAPES = {"small": ((8, 4, 64, 64),), "working": ((1, 4, 64, 64), (8, 4, 64, 64), (64, 4, 64, 64))}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-2}  # diffusers rounds the guided prediction, 7.5 times the error
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCALE, STEP = 7.5, 5


def _scheduler(kind: str, device: str) -> Any:
    scheduler = DDIMScheduler(**BETAS, clip_sample=False) if kind == "ddim" else DPMSolverMultistepScheduler(**BETAS)
    scheduler.set_timesteps(20, device=device)
    return scheduler


def _diffusers(kind: str, rescale: float, device: str) -> Callable[..., torch.Tensor]:
    scheduler = _scheduler(kind, device)
    timestep = scheduler.timesteps[STEP]

    def run(latents: torch.Tensor, prediction: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
        if kind == "dpm++":  # where a pipeline would be at this step
            scheduler._step_index, scheduler.lower_order_nums = STEP, 2
            scheduler.model_outputs = [None, history]
        unconditional, conditional = prediction.chunk(2)
        guided = unconditional + SCALE * (conditional - unconditional)
        if rescale:
            dims = list(range(1, guided.ndim))
            rescaled = guided * (conditional.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
            guided = rescale * rescaled + (1 - rescale) * guided
        return scheduler.step(guided, timestep, latents).prev_sample

    return run


def _cases(device: str, kind: str, rescale: float, shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    torch._dynamo.reset()
    schedule = step_schedule(_scheduler(kind, "cpu"), device=device)

    def ours(latents: torch.Tensor, prediction: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
        before = history if schedule.keeps_history else None
        return guided_step(latents, prediction, schedule, STEP, SCALE, rescale, None, before)[0]

    @torch.compile(dynamic=False)
    def compiled(latents: torch.Tensor, prediction: torch.Tensor, history: torch.Tensor) -> Any:
        before = history if schedule.keeps_history else None
        y, x0 = reference.guided_step(latents, prediction, schedule.table, STEP, SCALE, rescale, None, before)
        return (y, x0) if schedule.keeps_history else y

    def inputs() -> list[torch.Tensor]:
        latents, history = torch.randn(shape, device=device), torch.randn(shape, device=device)
        return [latents, torch.randn((2 * shape[0], *shape[1:]), device=device).to(dtype), history]

    elements = torch.Size(shape).numel()
    moved = elements * (8 + 2 * dtype.itemsize * (2 if rescale else 1) + (8 if schedule.keeps_history else 0))
    contenders = {
        "ours": ours,
        "diffusers": _diffusers(kind, rescale, device),
        "torch.compile": lambda *tensors: _first(compiled(*tensors)),
    }
    label = f"{kind}{' rescaled' if rescale else ''} prediction {str(dtype).removeprefix('torch.')} {list(shape)}"
    return Case("guided_step", label, inputs, contenders, moved, 12 * elements, TOLERANCE[dtype], device)


def _first(result: Any) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result[0]


def cases(device: str, size: str) -> Iterator[Case]:
    for shape in SHAPES[size]:
        for kind, rescale in (("ddim", 0.0), ("dpm++", 0.0), ("ddim", 0.7)):
            for dtype in (torch.float32, torch.bfloat16):
                yield _cases(device, kind, rescale, shape, dtype)


def boundary(device: str) -> dict[str, float]:
    """Microseconds per call on a [1, 16] tensor, where the kernel itself costs almost nothing."""
    schedule = step_schedule(_scheduler("ddim", "cpu"), device=device)
    latents, prediction = torch.randn(1, 16, device=device), torch.randn(2, 16, device=device)
    operator = OPERATORS["guided_step"].overloads["default"]
    flat = (latents, prediction, schedule.table, STEP, None, None, SCALE, 0.0, None, None, False)
    return {
        "x + x": cost_per_call_us(torch.add, (latents, latents)),
        "guided_step": cost_per_call_us(guided_step, (latents, prediction, schedule, STEP, SCALE)),
        "guided_step, operator alone": cost_per_call_us(operator, flat),
        "diffusers": cost_per_call_us(_diffusers("ddim", 0.0, device), (latents, prediction, latents), calls=400),
    }
