"""guided_step: classifier-free guidance, its rescale and a scheduler's update of the latents, in one pass."""

from __future__ import annotations

from typing import Any

import torch

from dreamkernels.ops.debug import check_range, debug_enabled
from dreamkernels.ops.guided_step import reference
from dreamkernels.ops.guided_step.schedule import StepSchedule, UnsupportedScheduler, step_schedule
from dreamkernels.ops.operator import FLOAT_DTYPES, choose, define, overload_for

__all__ = ["StepSchedule", "UnsupportedScheduler", "guided_step", "step_schedule"]


def _fake(
    latents, prediction, table, step, step_tensor, scales, guidance_scale, guidance_rescale, noise, history, keep_x0
):
    x0 = latents.new_empty(latents.shape if keep_x0 else (0,), dtype=torch.float32)
    return latents.new_empty(latents.shape), x0


GUIDED_STEP = define(
    "guided_step",
    "(Tensor latents, Tensor prediction, Tensor table, int step, Tensor? step_tensor, Tensor? scales, "
    "float guidance_scale, float guidance_rescale, Tensor? noise, Tensor? history, bool keep_x0) -> (Tensor, Tensor)",
    fake=_fake,
    triton="dreamkernels.ops.guided_step.triton:guided_step",
)


def _check_dtypes(latents: torch.Tensor, prediction: torch.Tensor) -> None:
    if latents.dtype not in FLOAT_DTYPES:
        raise ValueError(f"latents have dtype {latents.dtype}, which guided_step does not support {_DTYPES}; cast them")
    if prediction.dtype != latents.dtype and (latents.dtype != torch.float32 or prediction.dtype not in FLOAT_DTYPES):
        raise ValueError(
            f"prediction has dtype {prediction.dtype}; it must have that of latents, {latents.dtype}, or with float32 "
            f"latents any of {_DTYPES}; cast it"
        )


_DTYPES = "(float32, bfloat16, float16)"


def _check_like(x: torch.Tensor, name: str, latents: torch.Tensor, dtype: torch.dtype) -> None:
    if x.shape != latents.shape or x.dtype != dtype or x.device != latents.device:
        raise ValueError(
            f"{name} {list(x.shape)} {x.dtype} on {x.device} must be {list(latents.shape)} {dtype} on {latents.device}"
        )


def _check_scale(scale: Any, rescale: float, guided: bool, latents: torch.Tensor) -> None:
    if not 0.0 <= rescale <= 1.0:
        raise ValueError(f"guidance_rescale must be in [0, 1], not {rescale}")
    per_sample = isinstance(scale, torch.Tensor)
    if per_sample and (
        scale.shape != latents.shape[:1] or scale.dtype != torch.float32 or scale.device != latents.device
    ):
        raise ValueError(
            f"guidance_scale {list(scale.shape)} {scale.dtype} on {scale.device} must be a number or float32 "
            f"[{latents.shape[0]}] on {latents.device}, one per sample"
        )
    if not guided and (per_sample or scale != 1.0 or rescale):
        raise ValueError(
            "guidance needs prediction of two batches, [unconditional | conditional]; with one batch leave "
            "guidance_scale=1.0 and guidance_rescale=0.0"
        )


def _check_step(step: int | torch.Tensor, schedule: StepSchedule, latents: torch.Tensor) -> None:
    if schedule.table.device != latents.device:
        raise ValueError(
            f"the schedule's table is on {schedule.table.device}, latents on {latents.device}; "
            "move it once: schedule = schedule.to(latents.device)"
        )
    if not isinstance(step, torch.Tensor):
        if not 0 <= step < len(schedule):
            raise ValueError(f"step {step} is out of range: the schedule has the steps 0 to {len(schedule) - 1}")
    elif step.numel() != 1 or step.dtype not in (torch.int32, torch.int64) or step.device != latents.device:
        raise ValueError(
            f"step {list(step.shape)} {step.dtype} on {step.device} must be an int, or one int32 or int64 on "
            f"{latents.device}"
        )
    elif debug_enabled():
        check_range("guided_step", "step", step.reshape(1), 0, len(schedule), meaning="the steps of the schedule")


def _check_needed(
    step: int | torch.Tensor, schedule: StepSchedule, noise: torch.Tensor | None, history: torch.Tensor | None
) -> None:
    known = not isinstance(step, torch.Tensor)
    if noise is None and (schedule.needs_noise[step] if known else any(schedule.needs_noise)):  # type: ignore[index]
        raise ValueError(
            f"{'step ' + str(step) if known else 'some step'} of this {schedule.kind} schedule adds noise; give noise, "
            "standard normal with the shape of latents"
        )
    if history is None and schedule.keeps_history and not (known and step == 0):
        raise ValueError(
            f"a {schedule.kind} schedule needs history, what the step before returned; for the first step "
            "schedule.new_history(latents)"
        )


def guided_step(
    latents: torch.Tensor,
    prediction: torch.Tensor,
    schedule: StepSchedule,
    step: int | torch.Tensor,
    guidance_scale: float | torch.Tensor = 1.0,
    guidance_rescale: float = 0.0,
    noise: torch.Tensor | None = None,
    history: torch.Tensor | None = None,
    implementation: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One denoising step: e_u + w (e_c - e_u), its rescale, and the scheduler's update, computed in float32.

    Guidance: Ho and Salimans, Classifier-Free Diffusion Guidance, 2022. Rescale: Lin et al., Common Diffusion Noise
    Schedules and Sample Steps are Flawed, 2024, section 3.4. Updates: `step_schedule`. Nothing waits for the device,
    and with `step` as a device tensor a CUDA graph can advance it.

    Args:
        latents: [B, ...], float32, bfloat16 or float16.
        prediction: [2 B, ...], the model's output as [unconditional | conditional], or [B, ...] without guidance; dtype
            of latents, or any of the three with float32 latents.
        schedule: made by `step_schedule`, its table on the device of latents.
        step: index of the step, 0 is the first; an int, or one int32 or int64 on the device of latents. On CPU an index
            out of range raises; on CUDA one in a tensor is not checked, but taken to the nearest step (under
            `dreamkernels.ops.debug.debug_checks()` it raises).
        guidance_scale: w, a number, or float32 [B] with one per sample.
        guidance_rescale: share in [0, 1] by which the guided prediction is scaled back to the standard deviation of the
            conditional one, over all elements of a sample.
        noise: standard normal, shape and dtype of latents; needed where `schedule.needs_noise[step]`, else not read.
        history: float32, shape of latents: what the step before returned; for schedules that keep one. May be None at
            step 0.
        implementation: "auto" (CPU: C++, CUDA: Triton), or one of "cpu", "triton", "reference".

    Returns:
        (latents of the next step, history for it), contiguous; history is None where the schedule keeps none.
        Deterministic, and a sample does not depend on the others. Not differentiable.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, something needed is missing, or a tensor requires a gradient.
        RuntimeError: an index of step in a tensor is out of range (CPU).
    """
    _check_dtypes(latents, prediction)
    batch = latents.shape[0] if latents.dim() else 0
    if not latents.dim() or prediction.shape[1:] != latents.shape[1:] or prediction.shape[0] not in (batch, 2 * batch):
        raise ValueError(
            f"prediction {list(prediction.shape)} must be one or two batches of latents {list(latents.shape)}"
        )
    if prediction.device != latents.device:
        raise ValueError(f"prediction is on {prediction.device}, latents on {latents.device}")
    guided = prediction.shape[0] != batch
    if batch:
        _check_scale(guidance_scale, guidance_rescale, guided, latents)
    _check_step(step, schedule, latents)
    _check_needed(step, schedule, noise, history)
    if noise is not None:
        _check_like(noise, "noise", latents, latents.dtype)
    if history is not None:
        _check_like(history, "history", latents, torch.float32)
    chosen = choose(GUIDED_STEP.name, implementation, latents.device.type)
    if chosen == "reference":
        following, x0 = reference.guided_step(
            latents, prediction, schedule.table, step, guidance_scale, guidance_rescale, noise, history
        )
        return following, x0 if schedule.keeps_history else None
    if torch.is_grad_enabled() and (latents.requires_grad or prediction.requires_grad):
        raise ValueError('guided_step records no gradient; use torch.no_grad(), or implementation="reference"')
    in_tensor = isinstance(step, torch.Tensor)
    per_sample = isinstance(guidance_scale, torch.Tensor)
    following, x0 = overload_for(GUIDED_STEP, chosen, False)(
        latents,
        prediction,
        schedule.table,
        0 if in_tensor else step,
        step if in_tensor else None,
        guidance_scale if per_sample else None,
        1.0 if per_sample else guidance_scale,
        guidance_rescale,
        noise,
        history,
        schedule.keeps_history,
    )
    return following, x0 if schedule.keeps_history else None
