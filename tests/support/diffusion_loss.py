"""Inputs of the add_noise and diffusion_loss tests."""

import torch

from dreamkernels import add_noise, diffusion_loss
from dreamkernels.ops.diffusion_loss import reference
from tests.support.operators import assert_close_to_float64

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
# Elements per sample around the vectors of 8 and 16 and the blocks of 8192; one element.
SHAPES = ((1, 1), (3, 7), (2, 4, 9, 9), (1, 8209))
# of latents and noise, and of the prediction
DTYPES = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
)


def type_names(value):
    return "-".join(str(d).removeprefix("torch.") for d in value) if isinstance(value, tuple) else None


def alphas_cumprod(device="cpu"):
    """Stable Diffusion's schedule."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, device=device) ** 2
    return (1 - betas).cumprod(0)


def inputs(shape, dtypes, device="cpu", requires_grad=True):
    """prediction, latents, noise, timesteps, alphas_cumprod."""
    latents, noise = (torch.randn(shape, device=device).to(dtypes[0]) for _ in range(2))
    prediction = torch.randn(shape, device=device).to(dtypes[1]).requires_grad_(requires_grad)
    timesteps = torch.randint(0, 1000, shape[:1], device=device)
    return prediction, latents, noise, timesteps, alphas_cumprod(device)


def trials(shape):
    """Enough repetitions that a few thousand values are compared; the loss itself is one value per trial."""
    return max(24, min(64, 2048 // max(1, torch.Size(shape).numel())))


def compare_loss(shape, dtypes, settings, device="cpu", implementation="auto", repeats=None):
    def ours(*tensors):
        return diffusion_loss(*tensors, *settings, implementation=implementation)

    def wanted(*tensors):
        return reference.diffusion_loss(*tensors, *settings)

    assert_close_to_float64(ours, wanted, lambda: inputs(shape, dtypes, device), repeats or trials(shape))


def compare_noise(shape, dtypes, device="cpu", implementation="auto", repeats=None):
    def ours(*tensors):
        return add_noise(*tensors, dtypes[1], implementation)

    def wanted(latents, *rest):  # in float64 the truth is not rounded
        return reference.add_noise(latents, *rest, torch.float64 if latents.dtype == torch.float64 else dtypes[1])

    assert_close_to_float64(ours, wanted, lambda: inputs(shape, dtypes, device)[1:], repeats or trials(shape))
