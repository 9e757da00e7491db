"""The diffusion side of training: forward process, targets and weights, in float32 (spec A.7, A.9)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

import dreamkernels
from dreamkernels import add_noise
from dreamllm.model.configuration import DreamLLMConfig


@dataclass
class DiffusionDraws:
    """The random numbers of one diffusion loss over M pictures.

    `timesteps` int64 [M]; `noise` float32, shape of the latents (with the noise offset already added);
    `perturbation` the same shape or None; `keep_condition` bool [M] or None, False where the condition is dropped.
    """

    timesteps: Tensor
    noise: Tensor
    perturbation: Tensor | None = None
    keep_condition: Tensor | None = None

    def of(self, pictures: slice) -> DiffusionDraws:
        """The draws of some of the pictures, without `keep_condition`."""
        perturbation = None if self.perturbation is None else self.perturbation[pictures]
        return DiffusionDraws(self.timesteps[pictures], self.noise[pictures], perturbation)


def draw_diffusion(
    config: DreamLLMConfig,
    latent_shape: tuple[int, ...],
    device: torch.device,
    generator: torch.Generator | None = None,
) -> DiffusionDraws:
    """Draws what `diffusion_loss` needs, always in the same order: condition dropout, timesteps, noise, extras."""

    def randn(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    count, channels = latent_shape[:2]
    keep = None
    if config.condition_dropout > 0:
        keep = torch.rand(count, generator=generator, device=device) >= config.condition_dropout
    steps = config.scheduler_config.get("num_train_timesteps", 1000)
    timesteps = torch.randint(0, steps, (count,), generator=generator, device=device)
    noise = randn(latent_shape)
    if config.noise_offset:
        noise = noise + config.noise_offset * randn((count, channels, 1, 1))
    perturbation = randn(latent_shape) if config.input_perturbation else None
    return DiffusionDraws(timesteps, noise, perturbation, keep)


class NoiseSchedule:
    """The cumulative product of alphas of a diffusers scheduler configuration, kept in float32 on each device used.

    With `table_dtype` other than float32 the table is rounded to it first, as the original program does in bf16
    (compat="original"; it makes the first two timesteps noiseless).
    """

    def __init__(self, scheduler_config: dict[str, Any]) -> None:
        self.prediction_type: str = scheduler_config.get("prediction_type", "epsilon")
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type must be 'epsilon' or 'v_prediction', not {self.prediction_type!r}")
        with torch.device("cpu"):  # a model is loaded on the meta device, where a table would have no values
            self._alphas_cumprod = torch.cumprod(1.0 - _betas(scheduler_config), dim=0)
        self._on: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def alphas_cumprod(self, device: torch.device, table_dtype: torch.dtype = torch.float32) -> Tensor:
        key = (device, table_dtype)
        if key not in self._on:
            self._on[key] = self._alphas_cumprod.to(table_dtype).float().to(device)
        return self._on[key]


def _betas(config: dict[str, Any]) -> Tensor:
    steps = config.get("num_train_timesteps", 1000)
    start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    schedule = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float32)
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
    if schedule == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float32)
    if schedule == "squaredcos_cap_v2":
        curve = [math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(steps + 1)]
        return torch.tensor([min(1 - b / a, 0.999) for a, b in itertools.pairwise(curve)])
    raise ValueError(f"beta_schedule {schedule!r} is not supported (scaled_linear, linear, squaredcos_cap_v2)")


def dtype_of(unet: UNet2DConditionModel) -> torch.dtype:
    """The dtype of a UNet's weights. The UNet's own property walks through all its modules, 0.4 ms in every call."""
    return unet.conv_in.weight.dtype


def predict(unet: UNet2DConditionModel, latents: Tensor, timesteps: Tensor, condition: Any) -> Tensor:
    """The UNet's prediction: the one call of it, in training and in drawing.

    latents [M, C, h, w] of any dtype; timesteps int64, one or [M]; condition [M, Q, cross-attention width], or what a
    UNet that prepares its conditions takes instead, which is handed on as it is. The result has the UNet's dtype.
    """
    if isinstance(condition, Tensor):
        condition = condition.to(dtype_of(unet))
    return unet(latents.to(dtype_of(unet)), timesteps, condition).sample


def diffusion_loss(
    config: DreamLLMConfig,
    schedule: NoiseSchedule,
    unet: UNet2DConditionModel,
    latents: Tensor,
    condition: Any,
    draws: DiffusionDraws,
) -> Tensor:
    """Mean squared error of the UNet's prediction over all elements and pictures, a float32 scalar.

    latents [M, C, h, w]; condition as for `predict`. The gradient reaches `condition` through the UNet. With
    `snr_gamma`, each picture's error is weighted by min(SNR, gamma) / SNR, for v-prediction by min(SNR, gamma) /
    (SNR + 1) (Hang et al. 2023, section 3.4).
    """
    latents = latents.float()
    dtype = dtype_of(unet)
    alphas = schedule.alphas_cumprod(latents.device, dtype if config.compat == "original" else torch.float32)
    noise_in = draws.noise
    if draws.perturbation is not None:
        noise_in = noise_in + config.input_perturbation * draws.perturbation
    noisy = add_noise(latents, noise_in, draws.timesteps, alphas, dtype)
    predicted = predict(unet, noisy, draws.timesteps, condition)
    kind, gamma = schedule.prediction_type, config.snr_gamma
    if gamma is None or kind == "epsilon" or config.compat != "original":
        return dreamkernels.diffusion_loss(predicted, latents, draws.noise, draws.timesteps, alphas, kind, gamma)
    # The original adds one to the ratio before clamping, which clamps earlier than the paper's formula.
    error = dreamkernels.diffusion_loss(predicted, latents, draws.noise, draws.timesteps, alphas, kind, None, "none")
    a = alphas[draws.timesteps]
    snr = a / (1 - a) + 1
    return (error * snr.clamp(max=gamma) / snr).mean()


def mean_in_parts(loss_of: Callable[[slice, Tensor], Tensor], condition: Tensor, size: int) -> Tensor:
    """`loss_of(all pictures, condition)`, a mean over pictures, computed from at most `size` pictures at a time.

    condition [M, ...]. Each part gets its gradient at once, with respect to nothing but the condition, and its
    activations are gone before the next part begins and before the backward pass of what made the condition.
    """
    return _InParts.apply(condition, loss_of, size)


class _InParts(torch.autograd.Function):
    """The mean of a loss over pictures, part by part. The gradient of each part is taken before the next one begins."""

    @staticmethod
    def forward(ctx: Any, condition: Tensor, loss_of: Callable[[slice, Tensor], Tensor], size: int) -> Tensor:
        wanted, count = ctx.needs_input_grad[0], condition.shape[0]
        gradients: list[Tensor] = []
        total = torch.zeros((), device=condition.device)
        bounds = [part * count // -(-count // size) for part in range(-(-count // size) + 1)]  # nearly equal parts
        for start, end in itertools.pairwise(bounds):
            pictures = slice(start, end)
            part = condition[pictures].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                loss = loss_of(pictures, part) * ((end - start) / count)
            if wanted:
                with torch.autocast(condition.device.type, enabled=False):  # as in any backward pass
                    gradients += torch.autograd.grad(loss, part)
            total += loss.detach()
        ctx.save_for_backward(*([torch.cat(gradients)] if wanted else []))
        return total

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, None, None]:
        (gradient,) = ctx.saved_tensors
        return grad_loss * gradient, None, None
