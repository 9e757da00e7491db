"""The forward process of a diffusion and the loss of its prediction: the definition."""

from __future__ import annotations

import torch


def _amplitudes(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, dims: int) -> tuple[torch.Tensor, torch.Tensor]:
    a = alphas_cumprod[timesteps.long()].view(-1, *[1] * (dims - 1))
    return a.sqrt(), (1 - a).sqrt()


def add_noise(
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    wide = torch.promote_types(latents.dtype, torch.float32)
    signal, sigma = _amplitudes(alphas_cumprod.to(wide), timesteps, latents.dim())
    return (signal * latents.to(wide) + sigma * noise.to(wide)).to(dtype or latents.dtype)


def diffusion_loss(
    prediction: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    prediction_type: str = "epsilon",
    snr_gamma: float | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    wide = torch.promote_types(prediction.dtype, torch.float32)
    alphas = alphas_cumprod.to(wide)
    signal, sigma = _amplitudes(alphas, timesteps, prediction.dim())
    x, e = latents.to(wide), noise.to(wide)
    target = {"epsilon": lambda: e, "v_prediction": lambda: signal * e - sigma * x, "sample": lambda: x}[
        prediction_type
    ]()
    loss = (prediction.to(wide) - target).square().flatten(1).mean(1)
    if snr_gamma is not None:
        loss = loss * snr_weight(alphas[timesteps.long()], prediction_type, snr_gamma)
    return loss.mean() if reduction == "mean" else loss


def snr_weight(a: torch.Tensor, prediction_type: str, gamma: float) -> torch.Tensor:
    """Hang et al. 2023: min(SNR, gamma) times what turns an error of x0 into one of the prediction; SNR = a / (1 - a).

    Written without a quotient that is 0 / 0 where a is 0 or 1.
    """
    if prediction_type == "epsilon":  # min(SNR, gamma) / SNR
        return (gamma * (1 - a) / a).clamp(max=1)
    if prediction_type == "v_prediction":  # min(SNR, gamma) / (SNR + 1)
        return torch.minimum(a, gamma * (1 - a))
    return (a / (1 - a)).clamp(max=gamma)
