"""The one function through which every picture is created: conditions -> denoising -> pictures (spec A.7, F.2)."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dreamkernels import DreamCondition, FallbackWarning, StepSchedule, UnsupportedScheduler, guided_step, step_schedule
from dreamllm.inference.drawing import DrawingOptions, Progress, build_scheduler, check_seeds, with_steps
from dreamllm.model import DreamLLM
from dreamllm.model.codec import decode_latents
from dreamllm.model.diffusion import predict

OnStep = Callable[[int, Tensor], Tensor | None]
"""Called after each step with (steps done, latents of the batch, float32); what it returns takes their place."""


class DenoisingGraphs:
    """Denoising loops captured as CUDA graphs, kept from one `draw` to the next.

    A loop is captured at its first use, for its number of pictures, size and options, and replayed after that: one
    launch instead of thousands. Pictures are those of `draw` without it. A parameter of the UNet that moves to another
    address, as `.to()` may do, makes a new capture; a change of values does not.
    """

    def __init__(self) -> None:
        self._captured: dict[tuple, _CapturedLoop] = {}

    def __len__(self) -> int:
        return len(self._captured)

    def run(self, loop: _Loop, latents: Tensor, context: Tensor, noises: Sequence[Tensor | None]) -> Tensor:
        """Runs a loop on its inputs, as `loop.run` does."""
        key = (*loop.key(), tuple(latents.shape), tuple(context.shape), context.dtype)
        if key not in self._captured:
            self._captured[key] = _CapturedLoop(loop, latents, context, noises)
        return self._captured[key].replay(latents, context, noises)


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
    latent_shape = _latent_shape(model, options)
    count = _check(model, condition, null_condition, options, seeds, init_latents, latent_shape)
    condition = condition.repeat_interleave(options.candidates, dim=0)
    loop, make = _loop_of(model, options, scheduler, prepare_condition)
    steps = len(loop.times)
    if graphs is not None:
        _check_graphs(model, loop, on_step)
    batches = range(0, count, options.batch_size)
    pictures = []
    for number, start in enumerate(batches):
        rows = slice(start, start + options.batch_size)
        noise = _Noise(latent_shape, seeds[rows], model.device)
        latents = noise.first() if init_latents is None else init_latents[rows]
        context = _context(model, condition[rows], null_condition if options.guided else None)
        tick = _shifted(progress, number, len(batches), steps)
        if loop.schedule is None:
            stepping = _scheduler_steps(loop, make(), latents.to(model.device), context, noise, on_step)
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


class Denoising:
    """One batch of pictures that is drawn step by step, between other work. Pictures are those of `draw`.

    Arguments as of `draw`; `options.candidates` and `options.batch_size` do not count: condition [M, Q, C] and M seeds
    make M pictures. Raises as `draw`.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: DreamLLM,
        condition: Tensor,
        null_condition: Tensor | None,
        options: DrawingOptions,
        seeds: Sequence[int],
    ) -> None:
        options = replace(options, candidates=1)
        shape = _latent_shape(model, options)
        _check(model, condition, null_condition, options, seeds, None, shape)
        loop, make = _loop_of(model, options, None, None)
        noise = _Noise(shape, seeds, model.device)
        context = _context(model, condition, null_condition if options.guided else None)
        latents = noise.first().to(model.device)
        if loop.schedule is None:
            self._steps = _scheduler_steps(loop, make(), latents, context, noise)
        else:
            self._steps = loop.steps(latents * loop.schedule.init_noise_sigma, context, noise.next)
        self._vae, self._latents = model.vae, latents
        self.steps = len(loop.times)
        self.steps_done = 0

    @property
    def done(self) -> bool:
        return self.steps_done == self.steps

    @torch.no_grad()
    def step(self) -> None:
        """One denoising step of all pictures."""
        self._latents = next(self._steps)
        self.steps_done += 1

    @torch.no_grad()
    def pictures(self) -> Tensor:
        """float32 [M, channels, height, width] in [0, 1]: the pictures, or what there is of them so far."""
        return decode_latents(self._vae, self._latents)


# -- the loop ----------------------------------------------------------------------------------------------------------


class _Noise:
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
class _Loop:
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

    def predict(self, latents: Tensor, step: int, prepared: Any) -> Tensor:
        """[unconditional | conditional], or the conditional prediction alone."""
        latents = latents.to(self.unet.dtype)
        if self.options.guided and not isinstance(prepared, DreamCondition):  # which takes the latents of a half
            latents = torch.cat([latents, latents])
        return predict(self.unet, latents, self.times[step], prepared)

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
            prediction = self.predict(latents, step, prepared)
            noise = next_noise() if schedule.needs_noise[step] else None
            latents, history = guided_step(latents, prediction, schedule, step, scale, rescale, noise, history)
            latents = _after(on_step, step + 1, latents)
            yield latents

    def key(self) -> tuple:
        """What a captured loop depends on beside its inputs."""
        assert self.schedule is not None
        addresses = hash(tuple(p.data_ptr() for p in self.unet.parameters()))
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


def _scheduler_steps(
    loop: _Loop, scheduler: Any, latents: Tensor, context: Tensor, noise: _Noise, on_step: OnStep | None = None
) -> Iterator[Tensor]:
    """The latents after each step, taken by the scheduler's own `step`."""
    options = loop.options
    known = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {"generator": noise.generators} if "generator" in known else {}
    if "eta" in known:
        extra["eta"] = options.eta
    latents = latents.float() * scheduler.init_noise_sigma
    prepared = loop.prepare_condition(context)
    for step, timestep in enumerate(scheduler.timesteps.to(latents.device)):
        predicted = loop.predict(scheduler.scale_model_input(latents, timestep), step, prepared).float()
        if options.guided:
            unconditional, conditional = predicted.chunk(2)
            predicted = _guide(unconditional, conditional, options)
        latents = scheduler.step(predicted, timestep, latents, **extra).prev_sample
        latents = _after(on_step, step + 1, latents)
        yield latents


def _guide(unconditional: Tensor, conditional: Tensor, options: DrawingOptions) -> Tensor:
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


class _CapturedLoop:
    """One loop as a CUDA graph, between tensors that stay where they are."""

    def __init__(self, loop: _Loop, latents: Tensor, context: Tensor, noises: Sequence[Tensor | None]) -> None:
        self._loop = loop  # keeps the UNet and the schedule's table alive, whose addresses the graph holds
        self._latents, self._context = latents.clone(), context.clone()
        self._noises = [None if noise is None else noise.clone() for noise in noises]
        stream = torch.cuda.Stream(latents.device)
        stream.wait_stream(torch.cuda.current_stream(latents.device))
        with torch.cuda.stream(stream):  # kernels are compiled and workspaces allocated before the capture
            self._run()
        torch.cuda.current_stream(latents.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = self._run()

    def _run(self) -> Tensor:
        noises = iter([noise for noise in self._noises if noise is not None])
        return self._loop.run(self._latents, self._context, lambda: next(noises))

    def replay(self, latents: Tensor, context: Tensor, noises: Sequence[Tensor | None]) -> Tensor:
        self._latents.copy_(latents)
        self._context.copy_(context)
        for mine, given in zip(self._noises, noises, strict=True):
            if mine is not None and given is not None:
                mine.copy_(given)
        self._graph.replay()
        return self._result.clone()


# -- what the loop is made of ------------------------------------------------------------------------------------------


def _loop_of(
    model: DreamLLM,
    options: DrawingOptions,
    scheduler: Any,
    prepare_condition: Callable[[Tensor], Any] | None,
) -> tuple[_Loop, Callable[[], Any]]:
    """The loop, and what makes its scheduler."""
    make = _scheduler_maker(model, options, scheduler)
    first = make()
    prepare = model.prepare_condition if prepare_condition is None else prepare_condition
    schedule = _schedule_of(first, options, model.device)
    # Of some schedulers not options.steps times: Heun's method calls the UNet twice per step.
    times = model.prepare_times(_timesteps(first, schedule, model.device))
    return _Loop(model.unet, options, schedule, prepare, times), make


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


def _context(model: DreamLLM, condition: Tensor, null_condition: Tensor | None) -> Tensor:
    context = condition.to(model.unet.dtype)
    if null_condition is None:
        return context
    return torch.cat([null_condition.to(context).expand_as(context), context])


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


def _check_graphs(model: DreamLLM, loop: _Loop, on_step: OnStep | None) -> None:
    if model.device.type != "cuda":
        raise ValueError(f"CUDA graphs need a model on cuda, not on {model.device}; leave graphs=None")
    if on_step is not None:
        raise ValueError("on_step cannot look into a CUDA graph; leave one of on_step and graphs out")
    if loop.schedule is None:
        raise ValueError("this scheduler's own steps stop the host, so they cannot be captured; leave graphs=None")


def _latent_shape(model: DreamLLM, options: DrawingOptions) -> tuple[int, int, int]:
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
    _latent_shape(model, options)


def _pixels(model: DreamLLM, latent_shape: tuple[int, int, int]) -> tuple[int, int]:
    return latent_shape[1] * model.config.spatial_factor, latent_shape[2] * model.config.spatial_factor


def _shifted(progress: Progress | None, number: int, batches: int, steps: int) -> Callable[[int], None]:
    if progress is None:
        return lambda done: None
    return lambda done: progress(number * steps + done, batches * steps)
