"""Guided sampling with the UNet of `bench_diffusion_unet`, by DDIM: several prompts with several pictures each.

Ours is what `dreamllm.inference.sampler` does: keys and values of the condition once, time embeddings once, the guided
and unguided half together from their first cross-attention on, guidance and update in one pass. Beside it the loop of
diffusers' pipelines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from diffusers import DDIMScheduler

from benchmarks.harness import Case
from benchmarks.models.bench_diffusion_unet import KEYS, make_optimised, make_unet
from benchmarks.models.bench_diffusion_unet import SHAPES as UNETS
from dreamkernels import DreamCondition, guided_step, step_schedule

FAMILY = "models"
SCALE = 7.5
# Prompts, pictures of each, steps.
SHAPES = {"small": ((2, 2, 10),), "working": ((1, 1, 50), (4, 2, 50))}
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-1}  # bfloat16 predictions drift apart over the steps

Loop = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def make_scheduler(steps: int) -> DDIMScheduler:
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    scheduler.set_timesteps(steps)
    return scheduler


def plain_loop(unet, pictures: int, steps: int) -> Loop:
    @torch.no_grad()
    def run(latents: torch.Tensor, null: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        scheduler = make_scheduler(steps)
        conditions = condition.repeat_interleave(pictures, dim=0)
        context = torch.cat([null.expand_as(conditions), conditions])
        for timestep in scheduler.timesteps:
            doubled = torch.cat([latents, latents]).to(context.dtype)
            unguided, guided = unet(doubled, timestep, context).sample.float().chunk(2)
            prediction = unguided + SCALE * (guided - unguided)
            latents = scheduler.step(prediction, timestep, latents).prev_sample
        return latents

    return run


def prepared_loop(unet, report, pictures: int, steps: int) -> Loop:
    @torch.no_grad()
    def run(latents: torch.Tensor, null: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        schedule = step_schedule(make_scheduler(steps), device=latents.device)
        times = report.time_table(torch.tensor(schedule.timesteps))
        both = DreamCondition.concatenate(report.condition(null), report.condition(condition).repeat(pictures))
        history = schedule.new_history(latents)
        for step in range(steps):
            prediction = unet(latents.to(unet.dtype), times[step], both).sample
            latents, history = guided_step(latents, prediction, schedule, step, SCALE, 0.0, None, history)
        return latents

    return run


def cases(device: str, size: str) -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        prepared, plain = make_optimised(UNETS[size], device, dtype, frozen=True), make_unet(UNETS[size], device, dtype)
        for prompts, pictures, steps in SHAPES[size]:

            def make_inputs(
                dtype: torch.dtype = dtype, prompts: int = prompts, pictures: int = pictures
            ) -> list[torch.Tensor]:
                side, width = UNETS[size].side, UNETS[size].width
                latents = torch.randn(prompts * pictures, 4, side, side, device=device)
                null, *conditions = torch.randn(1 + prompts, KEYS, width, device=device).to(dtype).unbind()
                return [latents, null[None], torch.stack(conditions)]

            yield Case(
                "sampling",
                f"{str(dtype).removeprefix('torch.')}, {steps} guided steps, {prompts} prompts x {pictures} pictures",
                make_inputs,
                {
                    "optimize(frozen=True)": prepared_loop(*prepared, pictures, steps),
                    "diffusers": plain_loop(plain, pictures, steps),
                },
                bytes_moved=0,
                flops=0,
                relative_tolerance=TOLERANCE[dtype],
                device=device,
                samples=prompts * pictures,
                least_rounds=2,
                cold_bytes=1,
            )


def boundary(device: str) -> dict[str, float]:
    return {}
