"""How pictures are drawn: options, schedulers, seeds, and what becomes of the result (spec A.7, F.2)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from PIL import Image
from torch import Tensor

from dreamllm.model import DreamLLM

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
        candidates: pictures per condition. More than one only where nothing is written after the picture, or with
            `select`.
        select: folder of a CLIP model that chooses one of the candidates: the one that agrees best with the text before
            the picture, in an answer without one with the request. None: all candidates are kept.
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
    select: str | None = None
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
        if self.select is not None and self.candidates == 1:
            raise ValueError("select chooses among candidates; set candidates above 1")
        if self.eta and self.scheduler != "ddim":
            raise ValueError(f"eta {self.eta} has no meaning for scheduler {self.scheduler!r}; use 'ddim' or eta 0")

    def changed(self, **given: Any) -> DrawingOptions:
        """With what is given; None leaves an option as it is. Another scheduler than DDIM ends a recommended eta."""
        given = {name: value for name, value in given.items() if value is not None}
        if given.get("scheduler", "ddim") != "ddim":
            given.setdefault("eta", 0.0)
        return replace(self, **given)

    @property
    def guided(self) -> bool:
        """Whether the null condition takes part."""
        return self.guidance_scale > 1.0


def build_scheduler(scheduler_config: dict[str, Any], options: DrawingOptions) -> Any:
    """The diffusers scheduler of `options` on the model's noise schedule, with its time steps set.

    Raises `ValueError` for more steps than the schedule was trained with.
    """
    kind, extra = _SCHEDULERS[options.scheduler]
    known = inspect.signature(kind.__init__).parameters
    scheduler = kind(**{**{k: v for k, v in scheduler_config.items() if k in known}, **extra})
    return with_steps(scheduler, options.steps)


def with_steps(scheduler: Any, steps: int) -> Any:
    """A diffusers scheduler, its time steps set. Raises `ValueError` for more than it was trained with."""
    trained = scheduler.config.num_train_timesteps
    if steps > trained:
        raise ValueError(f"{steps} steps were asked for, but the noise schedule has only {trained}")
    scheduler.set_timesteps(steps)
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
