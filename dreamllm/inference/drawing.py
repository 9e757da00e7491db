"""The one function through which every picture is created: conditions -> denoising -> pictures (spec A.7, F.2)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from PIL import Image
from torch import Tensor

from dreamllm.model import DreamLLM
from dreamllm.model.codec import decode_latents

Scheduler = Literal["ddpm", "ddim", "dpm++"]
Progress = Callable[[int, int], None]
"""Called with (denoising steps done, denoising steps in all)."""

_SCHEDULERS: dict[str, tuple[Any, dict[str, str]]] = {
    "ddpm": (DDPMScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "dpm++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
}
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class DrawingOptions:
    """How pictures are drawn.

    Attributes:
        steps: denoising steps, at most the training schedule's length.
        guidance_scale: weight w of classifier-free guidance, e_u + w (e_c - e_u); active when greater than 1.
        guidance_rescale: share in [0, 1] by which the guided prediction is scaled back to the standard deviation of
            the conditional one (Lin et al. 2024, section 3.4).
        scheduler: "ddpm" (ancestral, what the original program uses), "ddim" or "dpm++" (second order, fewer steps).
            Each takes its betas, spacing and prediction type from the model's scheduler configuration.
        eta: noise added by "ddim", 0 (none) to 1 (as much as "ddpm"). The other schedulers accept only 0.
        size: side of the pictures in pixels, a multiple of 8 (of the UNet's reduction, for models on pixels);
            None: the model's own.
        candidates: pictures per condition. More than one only where nothing is written after the picture.
        negative_prompt: what the pictures are led away from; empty: the condition of the empty prompt.
        batch_size: pictures denoised together. Changes speed and memory, not the pictures.

    Raises `ValueError` when made with a value outside these ranges.
    """

    steps: int = 50
    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0
    scheduler: Scheduler = "ddpm"
    eta: float = 0.0
    size: int | None = None
    candidates: int = 1
    negative_prompt: str = ""
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.scheduler not in _SCHEDULERS:
            raise ValueError(f"unknown scheduler {self.scheduler!r}; known: {', '.join(_SCHEDULERS)}")
        for name in ("steps", "candidates", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("guidance_rescale", "eta"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], not {getattr(self, name)}")
        if not 0.0 <= self.guidance_scale < float("inf"):
            raise ValueError(f"guidance_scale must be a finite number of at least 0, not {self.guidance_scale}")
        if self.eta and self.scheduler != "ddim":
            raise ValueError(f"eta {self.eta} has no meaning for scheduler {self.scheduler!r}; use 'ddim' or eta 0")

    @property
    def guided(self) -> bool:
        """Whether the null condition takes part."""
        return self.guidance_scale > 1.0


@torch.no_grad()
def draw(
    model: DreamLLM,
    condition: Tensor,
    null_condition: Tensor | None,
    options: DrawingOptions,
    seeds: Sequence[int],
    init_latents: Tensor | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Draws M * candidates pictures from M conditions; the candidates of a condition are neighbours.

    `condition` [M, Q, C] and `null_condition` [Q, C] (needed when the guidance is active) are states at the dream
    queries after `project_condition`. `seeds` holds one seed per picture: it alone decides that picture's noise, so a
    picture does not depend on what else is drawn. `init_latents` [M * candidates, c, h, w] replaces the first noise.
    Returns float32 [M * candidates, channels, height, width] in [0, 1] on the model's device.

    Raises `ValueError` for shapes that do not fit the model, a wrong number of seeds, a missing null condition, or a
    size the model cannot draw.
    """
    latent_shape = _latent_shape(model, options)
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
    condition = condition.repeat_interleave(options.candidates, dim=0)
    null_condition = null_condition if options.guided else None
    batches = range(0, count, options.batch_size)
    pictures = []
    for number, start in enumerate(batches):
        rows = slice(start, start + options.batch_size)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[rows]]
        latents = _noise(latent_shape, generators) if init_latents is None else init_latents[rows]
        tick = _shifted(progress, number, len(batches), options.steps)
        latents = _denoise(model, latents, condition[rows], null_condition, options, generators, tick)
        pictures.append(decode_latents(model.vae, latents))
    if not pictures:
        return torch.zeros(0, model.config.picture_channels, *_pixels(model, latent_shape), device=model.device)
    return torch.cat(pictures)


def _denoise(
    model: DreamLLM,
    latents: Tensor,
    condition: Tensor,
    null_condition: Tensor | None,
    options: DrawingOptions,
    generators: list[torch.Generator],
    tick: Callable[[int], None],
) -> Tensor:
    scheduler = build_scheduler(model.config.scheduler_config, options)
    context = condition.to(model.unet.dtype)
    if null_condition is not None:
        context = torch.cat([null_condition.to(context).expand_as(context), context])
    extra: dict[str, Any] = {"eta": options.eta} if options.scheduler == "ddim" else {}
    latents = latents.to(model.device, torch.float32) * scheduler.init_noise_sigma
    for done, timestep in enumerate(scheduler.timesteps.to(model.device), start=1):
        halves = latents if null_condition is None else torch.cat([latents, latents])
        predicted = model.unet(halves.to(model.unet.dtype), timestep, context).sample.float()
        if null_condition is not None:
            unconditional, conditional = predicted.chunk(2)
            predicted = _guide(conditional, unconditional, options)
        latents = scheduler.step(predicted, timestep, latents, generator=generators, **extra).prev_sample
        tick(done)
    return latents


def _guide(conditional: Tensor, unconditional: Tensor, options: DrawingOptions) -> Tensor:
    guided = unconditional + options.guidance_scale * (conditional - unconditional)
    if not options.guidance_rescale:
        return guided
    dims = tuple(range(1, guided.ndim))
    ratio = conditional.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
    return guided * (options.guidance_rescale * ratio + 1.0 - options.guidance_rescale)


def build_scheduler(scheduler_config: dict[str, Any], options: DrawingOptions) -> Any:
    """The diffusers scheduler of `options` on the model's noise schedule, with its time steps set.

    Raises `ValueError` for more steps than the schedule was trained with.
    """
    kind, extra = _SCHEDULERS[options.scheduler]
    known = inspect.signature(kind.__init__).parameters
    scheduler = kind(**{**{k: v for k, v in scheduler_config.items() if k in known}, **extra})
    trained = scheduler.config.num_train_timesteps
    if options.steps > trained:
        raise ValueError(f"{options.steps} steps were asked for, but the noise schedule has only {trained}")
    scheduler.set_timesteps(options.steps)
    return scheduler


def drawing_defaults(model: DreamLLM) -> DrawingOptions:
    """The options that a model's configuration recommends (`config.drawing`), else the original program's.

    Raises `ValueError` when the configuration names an option that does not exist.
    """
    values = model.config.drawing
    try:
        return DrawingOptions(**values)
    except TypeError as error:
        raise ValueError(f"the model's config.drawing {values} does not hold drawing options: {error}") from error


def check_seeds(seeds: Sequence[int], count: int, what: str) -> None:
    """Raises `ValueError` unless there are `count` seeds, each in [0, 2**63)."""
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds were given, but {count} are needed, one per {what}")
    for seed in seeds:
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"a seed must be in [0, 2**63), not {seed}")


def picture_seed(seed: int, index: int) -> int:
    """The seed of a request's picture number `index`: the request's own for the first, mixed for later ones."""
    if index == 0:
        return seed
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> 1)


def to_pil(picture: Tensor) -> Image.Image:
    """One picture [1 or 3, H, W] in [0, 1] -> an 8-bit PIL image, mode L or RGB."""
    pixels = (picture.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return Image.fromarray(pixels[0] if pixels.shape[0] == 1 else pixels.transpose(1, 2, 0))


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


def _pixels(model: DreamLLM, latent_shape: tuple[int, int, int]) -> tuple[int, int]:
    return latent_shape[1] * model.config.spatial_factor, latent_shape[2] * model.config.spatial_factor


def _noise(shape: tuple[int, int, int], generators: list[torch.Generator]) -> Tensor:
    # Drawn on the CPU, so that a seed gives the same picture on every device.
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def _shifted(progress: Progress | None, number: int, batches: int, steps: int) -> Callable[[int], None]:
    if progress is None:
        return lambda done: None
    return lambda done: progress(number * steps + done, batches * steps)
