"""Guided sampling with the UNet of `bench_diffusion_unet`: 25 steps of DDIM, 4 prompts with 2 pictures each.

Ours is what `dreamllm.inference.sampler` does: keys and values of the condition once, time embeddings once, the guided
and unguided half together from their first cross-attention on, guidance and update in one pass. Beside it the loop of
diffusers' pipelines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from diffusers import DDIMScheduler

from benchmarks.harness import Case
from benchmarks.models.bench_diffusion_unet import KEYS, SIDE, WIDTH, make_optimised, make_unet
from dreamkernels import DreamCondition, guided_step, step_schedule

FAMILY = "unet"
PROMPTS, PICTURES, STEPS, SCALE = 4, 2, 25, 7.5
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-1}  # bfloat16 predictions drift apart over the steps

Loop = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def make_scheduler() -> DDIMScheduler:
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    scheduler.set_timesteps(STEPS)
    return scheduler


def plain_loop(unet) -> Loop:
    @torch.no_grad()
    def run(latents: torch.Tensor, null: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        scheduler = make_scheduler()
        pictures = condition.repeat_interleave(PICTURES, dim=0)
        context = torch.cat([null.expand_as(pictures), pictures])
        for timestep in scheduler.timesteps:
            doubled = torch.cat([latents, latents]).to(context.dtype)
            unguided, guided = unet(doubled, timestep, context).sample.float().chunk(2)
            prediction = unguided + SCALE * (guided - unguided)
            latents = scheduler.step(prediction, timestep, latents).prev_sample
        return latents

    return run


def prepared_loop(unet, report) -> Loop:
    @torch.no_grad()
    def run(latents: torch.Tensor, null: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        schedule = step_schedule(make_scheduler(), device=latents.device)
        times = report.time_table(torch.tensor(schedule.timesteps))
        both = DreamCondition.concatenate(report.condition(null), report.condition(condition).repeat(PICTURES))
        history = schedule.new_history(latents)
        for step in range(STEPS):
            prediction = unet(latents.to(unet.dtype), times[step], both).sample
            latents, history = guided_step(latents, prediction, schedule, step, SCALE, 0.0, None, history)
        return latents

    return run


def cases(device: str) -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):

        def make_inputs(dtype: torch.dtype = dtype) -> list[torch.Tensor]:
            latents = torch.randn(PROMPTS * PICTURES, 4, SIDE, SIDE, device=device)
            null, *prompts = torch.randn(1 + PROMPTS, KEYS, WIDTH, device=device).to(dtype).unbind()
            return [latents, null[None], torch.stack(prompts)]

        yield Case(
            "sampling",
            f"{str(dtype).removeprefix('torch.')}, {STEPS} guided steps, {PROMPTS} prompts x {PICTURES} pictures",
            make_inputs,
            {
                "optimize(frozen=True)": prepared_loop(*make_optimised(device, dtype, frozen=True)),
                "diffusers": plain_loop(make_unet(device, dtype)),
            },
            bytes_moved=0,
            flops=0,
            relative_tolerance=TOLERANCE[dtype],
            device=device,
            samples=PROMPTS * PICTURES,
            least_rounds=2,
            cold_bytes=1,
        )


def boundary(device: str) -> dict[str, float]:
    return {}
