"""add_noise and diffusion_loss: the forward process of a diffusion, and the weighted error of its prediction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dreamkernels.ops.debug import check_range, debug_enabled
from dreamkernels.ops.diffusion_loss import reference
from dreamkernels.ops.operator import FLOAT_DTYPES, Autograd, choose, define, overload_for

__all__ = ["add_noise", "diffusion_loss"]

_TRITON = "dreamkernels.ops.diffusion_loss.triton"
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")  # the operators take their position
REDUCTIONS = ("mean", "none")


def _fake_loss(prediction, latents, noise, timesteps, alphas_cumprod, target, snr_gamma, mean):
    return prediction.new_empty(() if mean else prediction.shape[:1], dtype=torch.float32)


ADD_NOISE = define(
    "add_noise",
    "(Tensor latents, Tensor noise, Tensor timesteps, Tensor alphas_cumprod, ScalarType dtype) -> Tensor",
    fake=lambda latents, noise, timesteps, alphas_cumprod, dtype: latents.new_empty(latents.shape, dtype=dtype),
    triton=f"{_TRITON}:add_noise",
)
BACKWARD = define(
    "diffusion_loss_backward",
    "(Tensor grad, Tensor prediction, Tensor latents, Tensor noise, Tensor timesteps, Tensor alphas_cumprod, "
    "int target, float? snr_gamma, bool mean) -> Tensor",
    fake=lambda grad, prediction, *rest: prediction.new_empty(prediction.shape),
    triton=f"{_TRITON}:diffusion_loss_backward",
)


def _save(ctx, inputs, output):
    *tensors, ctx.target, ctx.snr_gamma, ctx.mean = inputs
    ctx.save_for_backward(*tensors)


def _backward(backward: Any) -> Callable[..., Any]:
    def run(ctx, grad):
        grad_prediction = backward(grad, *ctx.saved_tensors, ctx.target, ctx.snr_gamma, ctx.mean)
        return grad_prediction, *(None,) * 7

    return run


DIFFUSION_LOSS = define(
    "diffusion_loss",
    "(Tensor prediction, Tensor latents, Tensor noise, Tensor timesteps, Tensor alphas_cumprod, int target, "
    "float? snr_gamma, bool mean) -> Tensor",
    fake=_fake_loss,
    triton=f"{_TRITON}:diffusion_loss",
    autograd=Autograd(_backward, _save, BACKWARD),
)


def _check_values(
    operator: str, latents: torch.Tensor, noise: torch.Tensor, like: torch.Tensor, dtype: torch.dtype
) -> None:
    """latents and noise as `like`, in float32 or in `dtype`."""
    if not latents.dim():
        raise ValueError(f"{operator}: latents need a batch dimension")
    for name, x in (("latents", latents), ("noise", noise)):
        if x.shape != like.shape or x.device != like.device:
            raise ValueError(
                f"{operator}: {name} {list(x.shape)} on {x.device} must be {list(like.shape)} on {like.device}"
            )
        if x.dtype not in (torch.float32, dtype):
            raise ValueError(f"{operator}: {name} has dtype {x.dtype}; it must be float32 or {dtype}; cast it")
    if noise.dtype != latents.dtype:
        raise ValueError(f"{operator}: noise has dtype {noise.dtype}, latents {latents.dtype}; they must agree")


def _check_schedule(
    operator: str, timesteps: torch.Tensor, alphas_cumprod: torch.Tensor, latents: torch.Tensor
) -> None:
    batch = latents.shape[0]
    if timesteps.shape != (batch,) or timesteps.dtype != torch.int64 or timesteps.device != latents.device:
        raise ValueError(
            f"{operator}: timesteps {list(timesteps.shape)} {timesteps.dtype} on {timesteps.device} must be "
            f"int64 [{batch}] on {latents.device}, one per sample"
        )
    if (
        alphas_cumprod.dim() != 1
        or not alphas_cumprod.shape[0]
        or alphas_cumprod.dtype != torch.float32
        or alphas_cumprod.device != latents.device
    ):
        raise ValueError(
            f"{operator}: alphas_cumprod {list(alphas_cumprod.shape)} {alphas_cumprod.dtype} on "
            f"{alphas_cumprod.device} must be float32 [T] on {latents.device}"
        )
    if debug_enabled():
        check_range(operator, "timesteps", timesteps, 0, alphas_cumprod.shape[0], meaning="the steps of alphas_cumprod")


def add_noise(
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    dtype: torch.dtype | None = None,
    implementation: str = "auto",
) -> torch.Tensor:
    """The forward process, sqrt(a_t) latents + sqrt(1 - a_t) noise, computed in float32 and rounded once.

    Ho et al., Denoising Diffusion Probabilistic Models, 2020, formula 4.

    Args:
        latents: [B, ...], float32, bfloat16 or float16.
        noise: shape, dtype and device of latents.
        timesteps: int64 [B], each in [0, T). On CPU a value out of range raises; on CUDA it is not checked, but taken
            to the nearest one (under `dreamkernels.ops.debug.debug_checks()` it raises).
        alphas_cumprod: float32 [T], the cumulative product of alphas, on the device of latents.
        dtype: of the result, for float32 latents any of the three; None: that of latents.
        implementation: "auto" (CPU: C++, CUDA: Triton), or one of "cpu", "triton", "reference".

    Returns:
        [B, ...], contiguous. Not differentiable: with a gradient it raises.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or latents or noise require a gradient.
        RuntimeError: a timestep is out of range (CPU).
    """
    dtype = dtype or latents.dtype
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"add_noise: dtype {dtype} is not supported (float32, bfloat16, float16)")
    _check_values("add_noise", latents, noise, latents, dtype)
    _check_schedule("add_noise", timesteps, alphas_cumprod, latents)
    chosen = choose(ADD_NOISE.name, implementation, latents.device.type)
    if chosen == "reference":
        return reference.add_noise(latents, noise, timesteps, alphas_cumprod, dtype)
    _refuse_gradient("add_noise", latents, noise)
    return overload_for(ADD_NOISE, chosen, False)(latents, noise, timesteps, alphas_cumprod, dtype)


def _refuse_gradient(operator: str, latents: torch.Tensor, noise: torch.Tensor) -> None:
    if torch.is_grad_enabled() and (latents.requires_grad or noise.requires_grad):
        raise ValueError(
            f'{operator} records no gradient of latents and noise; detach them, or choose implementation="reference"'
        )


def diffusion_loss(
    prediction: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    prediction_type: str = "epsilon",
    snr_gamma: float | None = None,
    reduction: str = "mean",
    implementation: str = "auto",
) -> torch.Tensor:
    """Mean squared error of a denoiser's prediction in float32. The target is never stored.

    Targets: epsilon: noise; v_prediction: sqrt(a_t) noise - sqrt(1 - a_t) latents (Salimans and Ho 2022); sample:
    latents. With `snr_gamma` every sample is weighted as in Hang et al., Efficient Diffusion Training via Min-SNR
    Weighting, 2023, section 3.4: min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v_prediction, / 1 for sample, where
    SNR = a_t / (1 - a_t).

    Args:
        prediction: [B, ...], float32, bfloat16 or float16.
        latents: the clean latents, shape of prediction; float32 or the dtype of prediction.
        noise: what was added; shape and dtype of latents.
        timesteps, alphas_cumprod: as for `add_noise`.
        prediction_type: "epsilon", "v_prediction" or "sample".
        snr_gamma: gamma, a positive number; None: no weights.
        reduction: "mean": over all elements and samples; "none": the weighted mean of every sample.
        implementation: "auto" (CPU: C++, CUDA: Triton), or one of "cpu", "triton", "reference".

    Returns:
        float32, a scalar or [B]. Differentiable with respect to prediction, in one pass; bitwise reproducible.

    Raises:
        ValueError: shapes, dtypes, devices or names do not fit, or latents or noise require a gradient.
        RuntimeError: a timestep is out of range (CPU).
    """
    if prediction.dtype not in FLOAT_DTYPES:
        raise ValueError(f"prediction has dtype {prediction.dtype}, which diffusion_loss does not support; cast it")
    _check_values("diffusion_loss", latents, noise, prediction, prediction.dtype)
    _check_schedule("diffusion_loss", timesteps, alphas_cumprod, prediction)
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type {prediction_type!r} is unknown ({', '.join(PREDICTION_TYPES)})")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction {reduction!r} is unknown ({', '.join(REDUCTIONS)})")
    if snr_gamma is not None and not 0.0 < snr_gamma < float("inf"):
        raise ValueError(f"snr_gamma must be a positive number or None, not {snr_gamma}")
    chosen = choose(DIFFUSION_LOSS.name, implementation, prediction.device.type)
    if chosen == "reference":
        return reference.diffusion_loss(
            prediction, latents, noise, timesteps, alphas_cumprod, prediction_type, snr_gamma, reduction
        )
    _refuse_gradient("diffusion_loss", latents, noise)
    needs_grad = torch.is_grad_enabled() and prediction.requires_grad
    return overload_for(DIFFUSION_LOSS, chosen, needs_grad)(
        prediction,
        latents,
        noise,
        timesteps,
        alphas_cumprod,
        PREDICTION_TYPES.index(prediction_type),
        snr_gamma,
        reduction == "mean",
    )
