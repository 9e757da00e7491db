"""One denoising step: guidance, rescale and a linear update of the latents, with the coefficients of one table row."""

from __future__ import annotations

import torch


def guided_step(
    latents: torch.Tensor,
    prediction: torch.Tensor,
    table: torch.Tensor,
    step: int | torch.Tensor,
    guidance_scale: float | torch.Tensor = 1.0,
    guidance_rescale: float = 0.0,
    noise: torch.Tensor | None = None,
    history: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(latents.dtype, torch.float32)
    x, m = latents.to(wide), prediction.to(wide)
    if prediction.shape[0] != latents.shape[0]:
        unconditional, conditional = m.chunk(2)
        m = _guided(unconditional, conditional, guidance_scale, guidance_rescale)
    row = table.index_select(0, step.reshape(1).long())[0] if isinstance(step, torch.Tensor) else table[step]
    x0_from_x, x0_from_m, limit, from_x0, from_x, from_m, from_history, from_noise = row.unbind()
    x0 = torch.clamp(x0_from_x * x + x0_from_m * m, -limit, limit)
    y = from_x0 * x0 + from_x * x + from_m * m
    if history is not None:
        y = y + torch.where(from_history == 0, 0, from_history * history)
    if noise is not None:
        y = y + torch.where(from_noise == 0, 0, from_noise * noise.to(wide))
    return y.to(latents.dtype), x0


def _guided(
    unconditional: torch.Tensor, conditional: torch.Tensor, scale: float | torch.Tensor, rescale: float
) -> torch.Tensor:
    """Ho and Salimans 2022; the rescale is that of Lin et al. 2024, section 3.4."""
    if isinstance(scale, torch.Tensor):
        scale = scale.view(-1, *[1] * (conditional.dim() - 1))
    guided = unconditional + scale * (conditional - unconditional)
    if not rescale:
        return guided
    dims = tuple(range(1, guided.dim()))
    ratio = conditional.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return guided * (rescale * ratio + 1.0 - rescale)
