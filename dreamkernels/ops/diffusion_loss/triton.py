"""GPU kernels of add_noise and diffusion_loss: element by element over samples.

    program p of add_noise and of the backward:  sample p // blocks, block p % blocks of it
    program (s, c) of the squares:               chunk c of sample s, at most CHUNKS chunks; writes its sum

A last program adds the sums of every sample in their order, weighs them, and takes the mean.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from dreamkernels.devices import architecture_of, launch_parameters, load_device
from dreamkernels.ops.launch import LAUNCH_OPTIONS, TRITON_DTYPES, ShippedKernel, on_device_of

CHUNKS = 128
NOISE = tl.constexpr(0)  # what is predicted
VELOCITY = tl.constexpr(1)


@triton.jit
def _alpha(timesteps, alphas_cumprod, sample, steps):
    timestep = tl.load(timesteps + sample).to(tl.int64)
    return tl.load(alphas_cumprod + tl.minimum(tl.maximum(timestep, 0), steps - 1))


@triton.jit
def add_noise_kernel(latents, noise, timesteps, alphas_cumprod, noisy, steps, elements, blocks, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    sample = program // blocks
    within = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = within < elements
    at = sample * elements + within
    a = _alpha(timesteps, alphas_cumprod, sample, steps)
    x = tl.load(latents + at, inside, other=0.0).to(tl.float32)
    e = tl.load(noise + at, inside, other=0.0).to(tl.float32)
    tl.store(noisy + at, (tl.sqrt(a) * x + tl.sqrt(1.0 - a) * e).to(noisy.dtype.element_ty), inside)


@triton.jit
def _difference(prediction, latents, noise, at, inside, a, TARGET: tl.constexpr):
    """prediction - target; zero outside."""
    p = tl.load(prediction + at, inside, other=0.0).to(tl.float32)
    if TARGET == NOISE:
        target = tl.load(noise + at, inside, other=0.0).to(tl.float32)
    else:
        target = tl.load(latents + at, inside, other=0.0).to(tl.float32)
        if TARGET == VELOCITY:
            e = tl.load(noise + at, inside, other=0.0).to(tl.float32)
            target = tl.sqrt(a) * e - tl.sqrt(1.0 - a) * target
    return p - target


@triton.jit
def _weight(a, gamma, TARGET: tl.constexpr):
    """Hang et al. 2023, without a quotient that is 0 / 0 where a is 0 or 1."""
    if TARGET == NOISE:
        weight = tl.minimum(gamma * (1.0 - a) / a, 1.0)
    else:
        if TARGET == VELOCITY:
            weight = tl.minimum(gamma * (1.0 - a), a)
        else:
            weight = tl.minimum(a / (1.0 - a), gamma)
    return weight


@triton.jit
def squares_kernel(
    prediction,
    latents,
    noise,
    timesteps,
    alphas_cumprod,
    sums,
    steps,
    elements,
    chunk_elements,
    TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1).to(tl.int64)
    a = _alpha(timesteps, alphas_cumprod, sample, steps)
    begin = chunk * chunk_elements
    end = tl.minimum(begin + chunk_elements, elements)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        within = start + tl.arange(0, BLOCK)
        d = _difference(prediction, latents, noise, sample * elements + within, within < end, a, TARGET)
        total += d * d
    tl.store(sums + sample * CHUNKS + chunk, tl.sum(total, axis=0))


@triton.jit
def loss_kernel(
    sums,
    timesteps,
    alphas_cumprod,
    loss,
    steps,
    samples,
    elements,
    chunks,
    gamma,
    TARGET: tl.constexpr,
    WEIGHTED: tl.constexpr,
    MEAN: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    chunk = tl.arange(0, CHUNKS)
    total = 0.0
    for sample in range(samples):
        found = tl.load(sums + sample * CHUNKS + chunk)  # a mask would split the load; the rest is memory of ours
        of_sample = tl.sum(tl.where(chunk < chunks, found, 0.0), axis=0) / elements
        if WEIGHTED:
            of_sample *= _weight(_alpha(timesteps, alphas_cumprod, sample, steps), gamma, TARGET)
        total += of_sample
        if not MEAN:
            tl.store(loss + sample, of_sample)
    if MEAN:
        tl.store(loss, total / samples)


@triton.jit
def backward_kernel(
    grad,
    prediction,
    latents,
    noise,
    timesteps,
    alphas_cumprod,
    grad_prediction,
    steps,
    elements,
    blocks,
    gamma,
    count,
    TARGET: tl.constexpr,
    WEIGHTED: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    sample = program // blocks
    within = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = within < elements
    at = sample * elements + within
    a = _alpha(timesteps, alphas_cumprod, sample, steps)
    factor = tl.load(grad + (0 if MEAN else sample)) * 2.0
    if WEIGHTED:
        factor *= _weight(a, gamma, TARGET)
    factor = tl.div_rn(factor, count)
    d = _difference(prediction, latents, noise, at, inside, a, TARGET)
    tl.store(grad_prediction + at, (factor * d).to(grad_prediction.dtype.element_ty), inside)


def add_noise(
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    noisy = torch.empty(latents.shape, dtype=dtype, device=latents.device)
    if not latents.numel():
        return noisy
    elements = latents.numel() // latents.shape[0]
    launch = launch_parameters(architecture_of(latents.device), "add_noise", elements)
    blocks = triton.cdiv(elements, launch["block_columns"])
    with on_device_of(latents):
        add_noise_kernel[(latents.shape[0] * blocks,)](
            latents.contiguous(),
            noise.contiguous(),
            timesteps.contiguous(),
            alphas_cumprod.contiguous(),
            noisy,
            alphas_cumprod.shape[0],
            elements,
            blocks,
            BLOCK=launch["block_columns"],
            num_warps=launch["num_warps"],
            **LAUNCH_OPTIONS,
        )
    return noisy


def diffusion_loss(
    prediction: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    target: int,
    snr_gamma: float | None,
    mean: bool,
) -> torch.Tensor:
    samples = prediction.shape[0]
    loss = prediction.new_empty(() if mean else (samples,), dtype=torch.float32)
    if not prediction.numel():
        return loss.fill_(torch.nan)  # the mean of nothing
    elements = prediction.numel() // samples
    launch = launch_parameters(architecture_of(prediction.device), "diffusion_loss", elements)
    block = launch["block_columns"]
    chunk = block * triton.cdiv(elements, block * CHUNKS)
    chunks = triton.cdiv(elements, chunk)
    sums = prediction.new_empty((samples, CHUNKS), dtype=torch.float32)
    timesteps, alphas_cumprod = timesteps.contiguous(), alphas_cumprod.contiguous()
    steps = alphas_cumprod.shape[0]
    with on_device_of(prediction):
        squares_kernel[(samples, chunks)](
            prediction.contiguous(),
            latents.contiguous(),
            noise.contiguous(),
            timesteps,
            alphas_cumprod,
            sums,
            steps,
            elements,
            chunk,
            TARGET=target,
            BLOCK=block,
            CHUNKS=CHUNKS,
            num_warps=launch["num_warps"],
            **LAUNCH_OPTIONS,
        )
        loss_kernel[(1,)](
            sums,
            timesteps,
            alphas_cumprod,
            loss,
            steps,
            samples,
            elements,
            chunks,
            snr_gamma or 0.0,
            TARGET=target,
            WEIGHTED=snr_gamma is not None,
            MEAN=mean,
            CHUNKS=CHUNKS,
            num_warps=1,
            **LAUNCH_OPTIONS,
        )
    return loss


def diffusion_loss_backward(
    grad: torch.Tensor,
    prediction: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    target: int,
    snr_gamma: float | None,
    mean: bool,
) -> torch.Tensor:
    grad_prediction = torch.empty_like(prediction, memory_format=torch.contiguous_format)
    if not prediction.numel():
        return grad_prediction
    samples = prediction.shape[0]
    elements = prediction.numel() // samples
    launch = launch_parameters(architecture_of(prediction.device), "diffusion_loss_backward", elements)
    blocks = triton.cdiv(elements, launch["block_columns"])
    with on_device_of(prediction):
        backward_kernel[(samples * blocks,)](
            grad.contiguous(),
            prediction.contiguous(),
            latents.contiguous(),
            noise.contiguous(),
            timesteps.contiguous(),
            alphas_cumprod.contiguous(),
            grad_prediction,
            alphas_cumprod.shape[0],
            elements,
            blocks,
            snr_gamma or 0.0,
            float(elements * (samples if mean else 1)),
            TARGET=target,
            WEIGHTED=snr_gamma is not None,
            MEAN=mean,
            BLOCK=launch["block_columns"],
            num_warps=launch["num_warps"],
            **LAUNCH_OPTIONS,
        )
    return grad_prediction


def _shipped(
    operator: str, kernel: object, dtype: torch.dtype, entry: dict[str, int], types: dict[str, str], **constants: object
) -> ShippedKernel:
    schedule = {"timesteps": "*i64", "alphas_cumprod": "*fp32", "steps": "i32", "elements": "i32"}
    return ShippedKernel(
        operator=operator,
        kernel=kernel,
        dtype=dtype,
        width=entry["max_width"],
        signature=types | schedule,
        constants=constants,
        num_warps=entry["num_warps"],
        divisible_by_16=("elements",) + (("chunk_elements",) if "chunk_elements" in types else ()),
    )


def shipped_kernels(architecture: str) -> Iterator[ShippedKernel]:
    """Every kernel with float32 latents and noise, at every dtype of the prediction and every target."""
    table = load_device(architecture).launch
    for dtype, element in TRITON_DTYPES.items():
        values = {"latents": "*fp32", "noise": "*fp32"}
        for entry in table["add_noise"]:
            types = values | {"noisy": f"*{element}", "blocks": "i32"}
            yield _shipped("add_noise", add_noise_kernel, dtype, entry, types, BLOCK=entry["block_columns"])
        values["prediction"] = f"*{element}"
        for target in range(3):
            for entry in table["diffusion_loss"]:
                types = values | {"sums": "*fp32", "chunk_elements": "i32"}
                constants = {"TARGET": target, "BLOCK": entry["block_columns"], "CHUNKS": CHUNKS}
                yield _shipped("diffusion_loss", squares_kernel, dtype, entry, types, **constants)
            for entry in table["diffusion_loss_backward"]:
                types = values | {"grad": "*fp32", "grad_prediction": f"*{element}", "blocks": "i32"}
                types |= {"gamma": "fp32", "count": "fp32"}
                constants = {"TARGET": target, "WEIGHTED": True, "MEAN": True, "BLOCK": entry["block_columns"]}
                yield _shipped("diffusion_loss_backward", backward_kernel, dtype, entry, types, **constants)
    for target in range(3):
        types = {"sums": "*fp32", "loss": "*fp32", "gamma": "fp32"} | dict.fromkeys(("samples", "chunks"), "i32")
        constants = {"TARGET": target, "WEIGHTED": True, "MEAN": True, "CHUNKS": CHUNKS}
        entry = {"max_width": table["diffusion_loss"][-1]["max_width"], "num_warps": 1}
        yield _shipped("diffusion_loss", loss_kernel, torch.float32, entry, types, **constants)
