"""The denoising loop: UNet, guidance and update, step by step (spec A.7, F.2)."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dreamkernels import (
    DreamCondition,
    FallbackWarning,
    StepSchedule,
    UnsupportedScheduler,
    addresses_of,
    guided_step,
    step_schedule,
)
from dreamllm.inference.drawing import DrawingOptions, build_scheduler, with_steps
from dreamllm.model import DreamLLM
from dreamllm.model.diffusion import predict

OnStep = Callable[[int, Tensor], Tensor | None]
"""Called after each step with (steps done, latents of the batch, float32); what it returns takes their place."""


class Noise:
    """The noise of a batch, drawn on the CPU picture by picture: a seed gives the same picture on every device."""

    def __init__(self, shape: tuple[int, int, int], seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._shape, self._device = shape, device

    def first(self) -> Tensor:
        return torch.stack([torch.randn(self._shape, generator=generator) for generator in self.generators])

    def next(self) -> Tensor:
        noise = self.first()
        if self._device.type == "cuda":  # from pinned memory the copy does not stop the host
            return noise.pin_memory().to(self._device, non_blocking=True)
        return noise.to(self._device)


@dataclass
class Loop:
    """A denoising loop: UNet, guidance and update. `schedule` is None where the scheduler takes its own steps."""

    unet: Any
    options: DrawingOptions
    schedule: StepSchedule | None
    prepare_condition: Callable[[Tensor], Any]
    times: Sequence[Any]  # what the UNet takes as time at each step

    @property
    def needs_noise(self) -> tuple[bool, ...]:
        assert self.schedule is not None
        return self.schedule.needs_noise

    def predict(self, latents: Tensor, time: Any, prepared: Any) -> Tensor:
        """[unconditional | conditional], or the conditional prediction alone, at a time of `times` or `time_of`."""
        latents = latents.to(self.unet.dtype)
        if self.options.guided and not isinstance(prepared, DreamCondition):  # which takes the latents of a half
            latents = torch.cat([latents, latents])
            if isinstance(time, Tensor) and time.dim():
                time = torch.cat([time, time])
        return predict(self.unet, latents, time, prepared)

    def time_of(self, steps: Sequence[int]) -> Any:
        """What the UNet takes as time for samples at these steps."""
        if len(set(steps)) == 1:
            return self.times[steps[0]]
        if isinstance(self.times, tuple):
            return torch.stack([self.times[step] for step in steps])
        return self.times[list(steps)]  # type: ignore[call-overload]

    def times_at(self, steps: Tensor) -> Any:
        """`time_of` steps int64 [M] on the device, which the host does not look at."""
        if isinstance(self.times, tuple):
            return torch.stack(self.times)[steps]
        return self.times[steps]  # type: ignore[call-overload]

    def run(
        self,
        latents: Tensor,
        context: Tensor,
        next_noise: Callable[[], Tensor],
        tick: Callable[[int], None] = lambda done: None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """All steps; latents float32. The host waits for nothing unless `on_step` does."""
        for done, after in enumerate(self.steps(latents, context, next_noise, on_step), 1):
            latents = after
            tick(done)
        return latents

    def steps(
        self, latents: Tensor, context: Tensor, next_noise: Callable[[], Tensor], on_step: OnStep | None = None
    ) -> Iterator[Tensor]:
        """The latents after each step."""
        schedule, guided = self.schedule, self.options.guided
        assert schedule is not None
        prepared = self.prepare_condition(context)
        scale = self.options.guidance_scale if guided else 1.0
        rescale = self.options.guidance_rescale if guided else 0.0
        history = schedule.new_history(latents)
        for step in range(len(self.times)):
            prediction = self.predict(latents, self.times[step], prepared)
            noise = next_noise() if schedule.needs_noise[step] else None
            latents, history = guided_step(latents, prediction, schedule, step, scale, rescale, noise, history)
            latents = _after(on_step, step + 1, latents)
            yield latents

    def key(self) -> tuple:
        """What a captured loop depends on beside its inputs."""
        assert self.schedule is not None
        addresses = addresses_of(self.unet.parameters())
        options = self.options
        guidance = (options.guidance_scale, options.guidance_rescale) if options.guided else None
        table = tuple(self.schedule.table.flatten().tolist())
        return (
            id(self.unet),
            addresses,
            self.prepare_condition,
            type(self.times),
            guidance,
            self.schedule.timesteps,
            table,
        )


def scheduler_steps(
    loop: Loop, scheduler: Any, latents: Tensor, context: Tensor, noise: Noise, on_step: OnStep | None = None
) -> Iterator[Tensor]:
    """The latents after each step, taken by the scheduler's own `step`."""
    extra = step_arguments(loop, scheduler, noise)
    latents = latents.float() * scheduler.init_noise_sigma
    prepared = loop.prepare_condition(context)
    for step, timestep in enumerate(scheduler.timesteps.to(latents.device)):
        predicted = loop.predict(scheduler.scale_model_input(latents, timestep), loop.times[step], prepared).float()
        if loop.options.guided:
            unconditional, conditional = predicted.chunk(2)
            predicted = guide(unconditional, conditional, loop.options)
        latents = scheduler.step(predicted, timestep, latents, **extra).prev_sample
        latents = _after(on_step, step + 1, latents)
        yield latents


def step_arguments(loop: Loop, scheduler: Any, noise: Noise) -> dict[str, Any]:
    """What a scheduler's own `step` takes besides prediction, time and latents."""
    known = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {"generator": noise.generators} if "generator" in known else {}
    return extra | ({"eta": loop.options.eta} if "eta" in known else {})


def guide(unconditional: Tensor, conditional: Tensor, options: DrawingOptions) -> Tensor:
    guided = unconditional + options.guidance_scale * (conditional - unconditional)
    if not options.guidance_rescale:
        return guided
    dims = tuple(range(1, guided.ndim))
    ratio = conditional.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
    return guided * (options.guidance_rescale * ratio + 1.0 - options.guidance_rescale)


def _after(on_step: OnStep | None, done: int, latents: Tensor) -> Tensor:
    replaced = None if on_step is None else on_step(done, latents)
    if replaced is None:
        return latents
    if replaced.shape != latents.shape:
        raise ValueError(f"on_step returned latents {list(replaced.shape)}; they must be {list(latents.shape)}")
    return replaced.to(latents)


# -- what the loop is made of ------------------------------------------------------------------------------------------


def loop_of(
    model: DreamLLM,
    options: DrawingOptions,
    scheduler: Any,
    prepare_condition: Callable[[Tensor], Any] | None,
) -> tuple[Loop, Callable[[], Any]]:
    """The loop, and what makes its scheduler."""
    make = _scheduler_maker(model, options, scheduler)
    first = make()
    prepare = model.prepare_condition if prepare_condition is None else prepare_condition
    schedule = _schedule_of(first, options, model.device)
    # Of some schedulers not options.steps times: Heun's method calls the UNet twice per step.
    times = model.prepare_times(_timesteps(first, schedule, model.device))
    return Loop(model.unet, options, schedule, prepare, times), make


def _scheduler_maker(model: DreamLLM, options: DrawingOptions, scheduler: Any) -> Callable[[], Any]:
    """Makes a scheduler with its steps set; a new one for every batch, because schedulers remember where they are."""
    if scheduler is None:
        return lambda: build_scheduler(model.config.scheduler_config, options)
    return lambda: with_steps(copy.deepcopy(scheduler), options.steps)


def _schedule_of(scheduler: Any, options: DrawingOptions, device: torch.device) -> StepSchedule | None:
    try:
        return step_schedule(scheduler, options.eta, device)
    except UnsupportedScheduler as reason:
        warnings.warn(
            f"drawing takes the steps of {type(scheduler).__name__} in eager PyTorch: {reason}; expect several times "
            "the time of guided_step between two calls of the UNet, and no CUDA graph",
            FallbackWarning,
            stacklevel=5,
        )
        return None


def _timesteps(scheduler: Any, schedule: StepSchedule | None, device: torch.device) -> Tensor:
    """The time of every call of the UNet, on the device once, so that no step copies its own there."""
    if schedule is None:
        return scheduler.timesteps.to(device)
    return torch.tensor(schedule.timesteps, device=schedule.table.device)


def context_of(model: DreamLLM, condition: Tensor, null_condition: Tensor | None) -> Tensor:
    context = condition.to(model.unet.dtype)
    if null_condition is None:
        return context
    return torch.cat([null_condition.to(context).expand_as(context), context])


def latent_shape_of(model: DreamLLM, options: DrawingOptions) -> tuple[int, int, int]:
    channels, side = model.config.unet_config["in_channels"], model.config.unet_config["sample_size"]
    if options.size is not None:
        blocks = len(model.config.unet_config["block_out_channels"])
        # Without a codec the size is the UNet's own: it must halve evenly at every level.
        multiple = 2 ** (blocks - 1) if model.config.identity_codec else model.config.spatial_factor
        if options.size < multiple or options.size % multiple:
            raise ValueError(f"size must be a positive multiple of {multiple} pixels, not {options.size}")
        side = options.size // model.config.spatial_factor
    return channels, side, side


def check_size(model: DreamLLM, options: DrawingOptions) -> None:
    """Raises `ValueError` for a size that the model cannot draw."""
    latent_shape_of(model, options)
