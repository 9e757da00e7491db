"""GPU kernels of guided_step: element by element over samples, with the scalars of one table row.

    program p:  sample p // blocks, elements [b * BLOCK, (b + 1) * BLOCK) of it, b = p % blocks

For the rescale of guidance, a kernel before it writes mean and squared differences of at most CHUNKS chunks of every
sample; every program of the step joins those of its sample in the same order (Chan, Golub and LeVeque, 1979).

    moments [samples, 4, CHUNKS]:  mean and squares of the conditional prediction, mean and squares of the guided one
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from dreamkernels.devices import architecture_of, launch_parameters, load_device
from dreamkernels.ops.launch import LAUNCH_OPTIONS, TRITON_DTYPES, ShippedKernel, on_device_of

CHUNKS = 128
COEFFICIENTS = tl.constexpr(8)


@triton.jit
def _block_moments(v, inside, n):
    """Mean and squared differences to it; the differences to a rounded mean tell what it lacks."""
    mean = tl.sum(v, axis=0) / n
    d = tl.where(inside, v - mean, 0.0)
    lacking = tl.sum(d, axis=0)
    return mean + lacking / n, tl.sum(d * d, axis=0) - lacking * lacking / n


@triton.jit
def moments_kernel(
    prediction,
    scales,
    moments,
    samples,
    elements,
    chunk_elements,
    scale,
    PER_SAMPLE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1).to(tl.int64)
    if PER_SAMPLE:
        scale = tl.load(scales + sample)
    unconditional = prediction + sample * elements
    conditional = prediction + (samples + sample) * elements
    begin = chunk * chunk_elements
    end = tl.minimum(begin + chunk_elements, elements)
    count = 0.0
    c_mean = 0.0
    c_squares = 0.0
    g_mean = 0.0
    g_squares = 0.0
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < end
        u = tl.load(unconditional + at, inside, other=0.0).to(tl.float32)
        c = tl.load(conditional + at, inside, other=0.0).to(tl.float32)
        g = u + scale * (c - u)
        n = tl.minimum(end - start, BLOCK).to(tl.float32)
        block_c, squares_c = _block_moments(c, inside, n)
        block_g, squares_g = _block_moments(g, inside, n)
        share = n / (count + n)
        c_squares += squares_c + (block_c - c_mean) * (block_c - c_mean) * count * share
        g_squares += squares_g + (block_g - g_mean) * (block_g - g_mean) * count * share
        c_mean += (block_c - c_mean) * share
        g_mean += (block_g - g_mean) * share
        count += n
    at = moments + sample * 4 * CHUNKS + chunk
    tl.store(at, c_mean)
    tl.store(at + CHUNKS, c_squares)
    tl.store(at + 2 * CHUNKS, g_mean)
    tl.store(at + 3 * CHUNKS, g_squares)


@triton.jit
def _variation(moments, inside, weight, elements):
    """Squared differences to the mean over all chunks."""
    chunk = tl.arange(0, weight.shape[0])
    mean = tl.load(moments + chunk, inside, other=0.0)
    squares = tl.load(moments + weight.shape[0] + chunk, inside, other=0.0)
    difference = mean - tl.sum(mean * weight, axis=0) / elements
    return tl.sum(squares + weight * difference * difference, axis=0)


@triton.jit
def step_kernel(
    latents,
    prediction,
    table,
    step_at,
    scales,
    moments,
    noise,
    history,
    following,
    x0,
    steps,
    samples,
    elements,
    blocks,
    chunk_elements,
    scale,
    rescale,
    STEP_AT: tl.constexpr,
    GUIDED: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    RESCALE: tl.constexpr,
    NOISE: tl.constexpr,
    HISTORY: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    sample = program // blocks
    within = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = within < elements
    at = sample * elements + within
    row = table
    if STEP_AT:
        step = tl.load(step_at).to(tl.int64)
        row += tl.minimum(tl.maximum(step, 0), steps - 1) * COEFFICIENTS
    x0_from_latents = tl.load(row)
    x0_from_prediction = tl.load(row + 1)
    limit = tl.load(row + 2)
    from_x0 = tl.load(row + 3)
    from_latents = tl.load(row + 4)
    from_prediction = tl.load(row + 5)
    from_history = tl.load(row + 6)
    from_noise = tl.load(row + 7)
    x = tl.load(latents + at, inside, other=0.0).to(tl.float32)
    m = tl.load(prediction + at, inside, other=0.0).to(tl.float32)
    if GUIDED:
        if PER_SAMPLE:
            scale = tl.load(scales + sample)
        c = tl.load(prediction + samples * elements + at, inside, other=0.0).to(tl.float32)
        m = m + scale * (c - m)
    if RESCALE:
        chunk_begin = tl.arange(0, CHUNKS).to(tl.int64) * chunk_elements
        filled = chunk_begin < elements
        weight = tl.where(filled, tl.minimum(elements - chunk_begin, chunk_elements), 0).to(tl.float32)
        of_sample = moments + sample * 4 * CHUNKS
        c_variation = _variation(of_sample, filled, weight, elements)
        g_variation = _variation(of_sample + 2 * CHUNKS, filled, weight, elements)
        m *= rescale * tl.sqrt(c_variation / g_variation) + (1.0 - rescale)
    clean = x0_from_latents * x + x0_from_prediction * m
    clean = tl.where(clean > limit, limit, clean)  # comparisons, not minimum: NaN must stay
    clean = tl.where(clean < -limit, -limit, clean)
    y = from_x0 * clean + from_latents * x + from_prediction * m
    if HISTORY:  # what has no weight is not read: at first there is nothing in it
        y += from_history * tl.load(history + at, within < tl.where(from_history != 0.0, elements, 0), other=0.0)
    if NOISE:
        added = tl.load(noise + at, within < tl.where(from_noise != 0.0, elements, 0), other=0.0)
        y += from_noise * added.to(tl.float32)
    tl.store(following + at, y.to(following.dtype.element_ty), inside)
    if KEEP:
        tl.store(x0 + at, clean, inside)


def _chunk_elements(elements: int, block: int) -> int:
    """Whole blocks per chunk, so that there are at most CHUNKS chunks."""
    return block * triton.cdiv(elements, block * CHUNKS)


def _moments(
    prediction: torch.Tensor, scales: torch.Tensor | None, scale: float, samples: int, elements: int
) -> tuple[torch.Tensor, int]:
    launch = launch_parameters(architecture_of(prediction.device), "guided_step_moments", elements)
    chunk = _chunk_elements(elements, launch["block_columns"])
    moments = prediction.new_empty((samples, 4, CHUNKS), dtype=torch.float32)
    moments_kernel[(samples, triton.cdiv(elements, chunk))](
        prediction,
        moments if scales is None else scales,
        moments,
        samples,
        elements,
        chunk,
        scale,
        PER_SAMPLE=scales is not None,
        BLOCK=launch["block_columns"],
        CHUNKS=CHUNKS,
        num_warps=launch["num_warps"],
        **LAUNCH_OPTIONS,
    )
    return moments, chunk


def guided_step(
    latents: torch.Tensor,
    prediction: torch.Tensor,
    table: torch.Tensor,
    step: int,
    step_tensor: torch.Tensor | None,
    scales: torch.Tensor | None,
    guidance_scale: float,
    guidance_rescale: float,
    noise: torch.Tensor | None,
    history: torch.Tensor | None,
    keep_x0: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    latents, prediction, table = latents.contiguous(), prediction.contiguous(), table.contiguous()
    following = torch.empty_like(latents)
    x0 = latents.new_empty(latents.shape if keep_x0 else (0,), dtype=torch.float32)
    if not latents.numel():
        return following, x0
    samples = latents.shape[0]
    elements = latents.numel() // samples
    guided = prediction.shape[0] == 2 * samples
    rescaled = guided and guidance_rescale != 0.0
    scales = None if scales is None else scales.contiguous()
    launch = launch_parameters(architecture_of(latents.device), "guided_step", elements)
    blocks = triton.cdiv(elements, launch["block_columns"])
    with on_device_of(latents):
        moments, chunk = _moments(prediction, scales, guidance_scale, samples, elements) if rescaled else (table, 1)
        step_kernel[(samples * blocks,)](
            latents,
            prediction,
            table if step_tensor is not None else table[step],
            table if step_tensor is None else step_tensor,
            table if scales is None else scales,
            moments,
            latents if noise is None else noise.contiguous(),
            table if history is None else history.contiguous(),
            following,
            x0,
            table.shape[0],
            samples,
            elements,
            blocks,
            chunk,
            guidance_scale,
            guidance_rescale,
            STEP_AT=step_tensor is not None,
            GUIDED=guided,
            PER_SAMPLE=scales is not None,
            RESCALE=rescaled,
            NOISE=noise is not None,
            HISTORY=history is not None,
            KEEP=keep_x0,
            BLOCK=launch["block_columns"],
            CHUNKS=CHUNKS,
            num_warps=launch["num_warps"],
            **LAUNCH_OPTIONS,
        )
    return following, x0


# What the schedules use: DDIM, DDPM (and DDIM with eta), DPM-Solver++; the last with everything on.
_FLAGS = {
    "ddim": {"GUIDED": True},
    "unguided": {},
    "ddpm": {"GUIDED": True, "NOISE": True},
    "dpm++": {"GUIDED": True, "HISTORY": True, "KEEP": True},
    "all": dict.fromkeys(("STEP_AT", "GUIDED", "PER_SAMPLE", "RESCALE", "NOISE", "HISTORY", "KEEP"), True),
}


def _shipped_step(
    latents: str, prediction: torch.dtype, entry: dict[str, int], flags: dict[str, bool]
) -> ShippedKernel:
    floats = ("table", "scales", "moments", "history", "x0")
    signature = {"latents": f"*{latents}", "prediction": f"*{TRITON_DTYPES[prediction]}", "step_at": "*i64"}
    signature |= {"noise": f"*{latents}", "following": f"*{latents}"} | dict.fromkeys(floats, "*fp32")
    signature |= dict.fromkeys(("steps", "samples", "elements", "blocks", "chunk_elements"), "i32")
    signature |= {"scale": "fp32", "rescale": "fp32"}
    off = dict.fromkeys(("STEP_AT", "GUIDED", "PER_SAMPLE", "RESCALE", "NOISE", "HISTORY", "KEEP"), False)
    return ShippedKernel(
        operator="guided_step" if latents == "fp32" else "guided_step.narrow_latents",
        kernel=step_kernel,
        dtype=prediction,
        width=entry["max_width"],
        signature=signature,
        constants={**off, **flags, "BLOCK": entry["block_columns"], "CHUNKS": CHUNKS},
        num_warps=entry["num_warps"],
        divisible_by_16=("elements", "chunk_elements"),
    )


def shipped_kernels(architecture: str) -> Iterator[ShippedKernel]:
    """The step on float32 latents at every dtype of the prediction, on latents of the prediction's dtype, and the
    moments."""
    table = load_device(architecture).launch
    for dtype, element in TRITON_DTYPES.items():
        for entry in table["guided_step"]:
            for flags in _FLAGS.values():
                yield _shipped_step("fp32", dtype, entry, flags)
            if element != "fp32":
                yield _shipped_step(element, dtype, entry, _FLAGS["all"])
        for entry in table["guided_step_moments"]:
            yield ShippedKernel(
                operator="guided_step",
                kernel=moments_kernel,
                dtype=dtype,
                width=entry["max_width"],
                signature={"prediction": f"*{element}", "scales": "*fp32", "moments": "*fp32"}
                | dict.fromkeys(("samples", "elements", "chunk_elements"), "i32")
                | {"scale": "fp32"},
                constants={"PER_SAMPLE": False, "BLOCK": entry["block_columns"], "CHUNKS": CHUNKS},
                num_warps=entry["num_warps"],
                divisible_by_16=("elements", "chunk_elements"),
            )
