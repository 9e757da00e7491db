"""The one function through which every picture is created: conditions -> denoising -> pictures (spec A.7, F.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dreamllm.inference.drawing import DrawingOptions, Progress, check_seeds
from dreamllm.inference.graphs import DenoisingGraphs, check_graphs
from dreamllm.inference.loop import Noise, OnStep, context_of, latent_shape_of, loop_of, scheduler_steps
from dreamllm.model import DreamLLM
from dreamllm.model.codec import decode_latents


@torch.no_grad()
def draw(
    model: DreamLLM,
    condition: Tensor,
    null_condition: Tensor | None,
    options: DrawingOptions,
    seeds: Sequence[int],
    init_latents: Tensor | None = None,
    progress: Progress | None = None,
    scheduler: Any = None,
    on_step: OnStep | None = None,
    prepare_condition: Callable[[Tensor], Any] | None = None,
    graphs: DenoisingGraphs | None = None,
) -> Tensor:
    """Draws M * candidates pictures from M conditions; the candidates of a condition are neighbours.

    Args:
        model: whose UNet and codec draw.
        condition: [M, Q, C], states at the dream queries after `project_condition`.
        null_condition: [Q, C], what guidance leads away from; needed when the guidance is active.
        options: steps, guidance, scheduler, size, ...
        seeds: one per picture: it alone decides that picture's noise, so a picture does not depend on what else is
            drawn.
        init_latents: [M * candidates, c, h, w], replaces the first noise.
        progress: told of every step of every batch.
        scheduler: any diffusers scheduler, with its own noise schedule and prediction type, in place of
            `options.scheduler`. It is copied, and its time steps are set here.
        on_step: sees the latents of a batch after each step, and may replace them.
        prepare_condition: called once per batch with [unconditional | conditional] (or the conditional alone),
            [B, Q, C] in the UNet's dtype; what it returns is given to the UNet at every step. None:
            `model.prepare_condition`.
        graphs: on CUDA, run the loop as one CUDA graph kept there. Not with on_step, nor with a scheduler that
            `guided_step` does not support; `progress` is told of a whole loop at once.

    Returns:
        float32 [M * candidates, channels, height, width] in [0, 1] on the model's device.

    Raises:
        ValueError: shapes do not fit the model, a wrong number of seeds, a missing null condition, a size the model
            cannot draw, more steps than the noise schedule has, or graphs where there can be none.

    A scheduler that `guided_step` does not support works through its own `step`, with a `FallbackWarning`.
    """
    latent_shape = latent_shape_of(model, options)
    count = _check(model, condition, null_condition, options, seeds, init_latents, latent_shape)
    condition = condition.repeat_interleave(options.candidates, dim=0)
    loop, make = loop_of(model, options, scheduler, prepare_condition)
    steps = len(loop.times)
    if graphs is not None:
        check_graphs(model, loop, on_step)
    batches = range(0, count, options.batch_size)
    pictures = []
    for number, start in enumerate(batches):
        rows = slice(start, start + options.batch_size)
        noise = Noise(latent_shape, seeds[rows], model.device)
        latents = noise.first() if init_latents is None else init_latents[rows]
        context = context_of(model, condition[rows], null_condition if options.guided else None)
        tick = _shifted(progress, number, len(batches), steps)
        if loop.schedule is None:
            stepping = scheduler_steps(loop, make(), latents.to(model.device), context, noise, on_step)
            for done, after in enumerate(stepping, 1):
                latents = after
                tick(done)
        else:
            latents = latents.to(model.device, torch.float32) * loop.schedule.init_noise_sigma
            if graphs is None:
                latents = loop.run(latents, context, noise.next, tick, on_step)
            else:
                latents = graphs.run(loop, latents, context, [noise.next() if n else None for n in loop.needs_noise])
                tick(steps)
        pictures.append(decode_latents(model.vae, latents))
    if not pictures:
        return torch.zeros(0, model.config.picture_channels, *_pixels(model, latent_shape), device=model.device)
    return torch.cat(pictures)


def _check(
    model: DreamLLM,
    condition: Tensor,
    null_condition: Tensor | None,
    options: DrawingOptions,
    seeds: Sequence[int],
    init_latents: Tensor | None,
    latent_shape: tuple[int, int, int],
) -> int:
    """The number of pictures. Raises as `draw`."""
    expected = (model.config.num_dream_queries, model.config.condition_size)
    if condition.ndim != 3 or tuple(condition.shape[1:]) != expected:
        raise ValueError(f"condition must be [M, {expected[0]}, {expected[1]}], not {list(condition.shape)}")
    count = condition.shape[0] * options.candidates
    check_seeds(seeds, count, "picture")
    if options.guided:
        if null_condition is None:
            raise ValueError(f"guidance_scale {options.guidance_scale} needs the null condition")
        if tuple(null_condition.shape) != expected:
            raise ValueError(f"null_condition must be {list(expected)}, not {list(null_condition.shape)}")
    if init_latents is not None and tuple(init_latents.shape) != (count, *latent_shape):
        raise ValueError(f"init_latents must be {[count, *latent_shape]}, not {list(init_latents.shape)}")
    return count


def _shifted(progress: Progress | None, number: int, batches: int, steps: int) -> Callable[[int], None]:
    if progress is None:
        return lambda done: None
    return lambda done: progress(number * steps + done, batches * steps)


def _pixels(model: DreamLLM, latent_shape: tuple[int, int, int]) -> tuple[int, int]:
    return latent_shape[1] * model.config.spatial_factor, latent_shape[2] * model.config.spatial_factor
