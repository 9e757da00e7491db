"""add_noise and diffusion_loss against what training scripts write, torch.compile of it, and diffusers' scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.harness import Case, cost_per_call_us
from dreamkernels import add_noise, diffusion_loss

FAMILY = "unet"
SHAPES = {"small": ((8, 4, 64, 64),), "working": ((16, 4, 64, 64), (128, 4, 64, 64))}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
GAMMA = 5.0


def _amplitudes(timesteps: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a = table[timesteps].view(-1, 1, 1, 1)
    return a.sqrt(), (1 - a).sqrt()


def eager_noise(
    latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, table: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    signal, sigma = _amplitudes(timesteps, table)
    return (signal * latents + sigma * noise).to(dtype)


def eager_loss(
    prediction: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    table: torch.Tensor,
    kind: str,
    gamma: float | None,
) -> torch.Tensor:
    signal, sigma = _amplitudes(timesteps, table)
    target = noise if kind == "epsilon" else signal * noise - sigma * latents
    if gamma is None:
        return F.mse_loss(prediction.float(), target)
    error = F.mse_loss(prediction.float(), target, reduction="none").flatten(1).mean(1)
    snr = ((signal / sigma) ** 2).flatten()
    return (error * snr.clamp(max=gamma) / (snr if kind == "epsilon" else snr + 1)).mean()


def with_backward(forward: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def run(prediction: torch.Tensor, *rest: Any) -> Any:
        loss = forward(prediction, *rest)
        return loss.detach(), *torch.autograd.grad(loss, [prediction])

    return run


def cases(device: str, size: str) -> Iterator[Case]:
    for shape in SHAPES[size]:
        for dtype in (torch.bfloat16, torch.float32):
            yield _noise_case(device, shape, dtype)
            for kind, gamma in (("epsilon", None), ("v_prediction", GAMMA)):
                yield _loss_case(device, shape, dtype, kind, gamma)


def _tensors(device: str, shape: tuple[int, ...]) -> list[torch.Tensor]:
    table = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, device=device) ** 2).cumprod(0)
    timesteps = torch.randint(0, 1000, shape[:1], device=device)
    return [torch.randn(shape, device=device), torch.randn(shape, device=device), timesteps, table]


def _noise_case(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    torch._dynamo.reset()
    elements = torch.Size(shape).numel()
    contenders = {"ours": add_noise, "eager": eager_noise, "torch.compile": torch.compile(eager_noise, dynamic=False)}
    label = f"to {str(dtype).removeprefix('torch.')} {list(shape)}"
    moved = elements * (8 + dtype.itemsize)
    return Case(
        "add_noise", label, lambda: [*_tensors(device, shape), dtype], contenders, moved, 3 * elements,
        TOLERANCE[dtype], device, peers={peers.DIFFUSERS: peers.diffusers_add_noise(device, BETAS)},
    )  # fmt: skip


def _loss_case(device: str, shape: tuple[int, ...], dtype: torch.dtype, kind: str, gamma: float | None) -> Case:
    torch._dynamo.reset()
    elements = torch.Size(shape).numel()
    calls = {
        "ours": diffusion_loss,
        "eager": eager_loss,
        "torch.compile": torch.compile(eager_loss, dynamic=False),
    }

    def inputs() -> list[Any]:
        prediction = torch.randn(shape, device=device).to(dtype).requires_grad_()
        return [prediction, *_tensors(device, shape), kind, gamma]

    read = dtype.itemsize + (4 if kind == "epsilon" else 8)
    label = f"forward+backward {kind}{' min-SNR' if gamma else ''} {str(dtype).removeprefix('torch.')} {list(shape)}"
    contenders = {name: with_backward(call) for name, call in calls.items()}
    moved = elements * (2 * read + dtype.itemsize)
    return Case("diffusion_loss", label, inputs, contenders, moved, 6 * elements, TOLERANCE[dtype], device)


def boundary(device: str) -> dict[str, float]:
    """Microseconds per call on a [2, 1, 4, 4] tensor, where the kernel itself costs almost nothing."""
    tensors = _tensors(device, (2, 1, 4, 4))
    tracked = torch.randn(2, 1, 4, 4, device=device, requires_grad=True)
    return {
        "x + x": cost_per_call_us(torch.add, (tensors[0], tensors[0])),
        "add_noise": cost_per_call_us(add_noise, tensors),
        "add_noise, eager": cost_per_call_us(eager_noise, (*tensors, torch.float32)),
        "diffusion_loss": cost_per_call_us(diffusion_loss, (tensors[0], *tensors)),
        "diffusion_loss, recording a gradient": cost_per_call_us(diffusion_loss, (tracked, *tensors)),
        "diffusion_loss, eager": cost_per_call_us(eager_loss, (tracked, *tensors, "epsilon", None)),
    }
