"""Inputs of the guided_step tests, and one step of a diffusers scheduler in float32 or, as the truth, in float64."""

import copy
import sys
from unittest import mock

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from dreamkernels import guided_step, step_schedule
from dreamkernels.ops.guided_step import StepSchedule, reference
from dreamkernels.testing import assert_within_eager_error

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
TRAILING_ZERO_SNR = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}


def _ddpm(**settings):
    return DDPMScheduler(**{**STABLE_DIFFUSION, "clip_sample": False, **settings})


def _ddim(**settings):
    return DDIMScheduler(**{**STABLE_DIFFUSION, "clip_sample": False, **settings})


def _dpm(**settings):
    return DPMSolverMultistepScheduler(**{**STABLE_DIFFUSION, **settings})


# name -> (scheduler, steps, eta)
SCHEDULERS = {
    "ddpm leading": lambda: (_ddpm(**LEADING), 10, 0.0),
    "ddpm linspace v": lambda: (_ddpm(timestep_spacing="linspace", prediction_type="v_prediction"), 7, 0.0),
    "ddpm trailing sample": lambda: (_ddpm(timestep_spacing="trailing", prediction_type="sample"), 7, 0.0),
    "ddpm clipped": lambda: (_ddpm(clip_sample=True, clip_sample_range=1.5), 7, 0.0),
    "ddpm fixed_large": lambda: (_ddpm(variance_type="fixed_large"), 7, 0.0),
    "ddpm fixed_small_log": lambda: (_ddpm(variance_type="fixed_small_log"), 7, 0.0),
    "ddpm zero snr v": lambda: (_ddpm(**TRAILING_ZERO_SNR, prediction_type="v_prediction"), 7, 0.0),
    "ddpm cosine": lambda: (_ddpm(beta_schedule="squaredcos_cap_v2"), 9, 0.0),
    "ddpm one step": lambda: (_ddpm(), 1, 0.0),
    "ddim leading": lambda: (_ddim(**LEADING), 10, 0.0),
    "ddim not to one": lambda: (_ddim(**LEADING, set_alpha_to_one=False), 10, 0.0),
    "ddim linspace eta": lambda: (_ddim(timestep_spacing="linspace"), 7, 0.7),
    "ddim v eta 1": lambda: (_ddim(prediction_type="v_prediction"), 7, 1.0),
    "ddim sample": lambda: (_ddim(prediction_type="sample", timestep_spacing="trailing"), 7, 0.0),
    "ddim clipped": lambda: (_ddim(clip_sample=True, clip_sample_range=1.5), 7, 0.3),
    "ddim zero snr v": lambda: (_ddim(**TRAILING_ZERO_SNR, prediction_type="v_prediction"), 7, 0.0),
    "ddim zero snr sample": lambda: (_ddim(**TRAILING_ZERO_SNR, prediction_type="sample"), 7, 0.0),
    "dpm++ linspace": lambda: (_dpm(), 10, 0.0),
    "dpm++ many steps": lambda: (_dpm(**LEADING), 20, 0.0),
    "dpm++ v sigma_min": lambda: (_dpm(prediction_type="v_prediction", final_sigmas_type="sigma_min"), 16, 0.0),
    "dpm++ sigma_min few": lambda: (_dpm(final_sigmas_type="sigma_min"), 9, 0.0),
    "dpm++ no lower order": lambda: (_dpm(final_sigmas_type="sigma_min", lower_order_final=False), 9, 0.0),
    "dpm++ euler at final": lambda: (_dpm(final_sigmas_type="sigma_min", euler_at_final=True), 16, 0.0),
    "dpm++ sample trailing": lambda: (_dpm(prediction_type="sample", timestep_spacing="trailing"), 9, 0.0),
    "dpm++ heun": lambda: (_dpm(solver_type="heun"), 9, 0.0),
    "dpm++ first order": lambda: (_dpm(solver_order=1), 9, 0.0),
    "dpm++ karras": lambda: (_dpm(use_karras_sigmas=True), 9, 0.0),
    "dpm++ zero snr v": lambda: (_dpm(rescale_betas_zero_snr=True, prediction_type="v_prediction"), 9, 0.0),
    "dpm++ sde": lambda: (_dpm(algorithm_type="sde-dpmsolver++"), 9, 0.0),
    "dpm++ sde heun": lambda: (_dpm(algorithm_type="sde-dpmsolver++", solver_type="heun"), 9, 0.0),
}


def ready(name):
    """A scheduler with its time steps set, and eta."""
    scheduler, steps, eta = SCHEDULERS[name]()
    scheduler.set_timesteps(steps)
    return scheduler, eta


def in_float64(scheduler):
    """A copy whose scalars are float64, as are then its steps on float64 tensors."""
    wide = copy.deepcopy(scheduler)
    for name in ("betas", "alphas", "alphas_cumprod", "one", "final_alpha_cumprod", "sigmas"):
        if hasattr(wide, name):
            setattr(wide, name, getattr(wide, name).double())
    return wide


def diffusers_step(scheduler, prediction, timestep, latents, noise, eta):
    """The scheduler's own step, given the noise that it would draw."""
    extra = {"eta": eta} if isinstance(scheduler, DDIMScheduler) else {}
    with mock.patch.object(sys.modules[type(scheduler).__module__], "randn_tensor", return_value=noise):
        if latents.dtype == torch.float64:  # DPMSolverMultistepScheduler takes every sample to torch.float32
            with mock.patch.object(torch, "float32", torch.float64):
                return scheduler.step(prediction, timestep, latents, **extra).prev_sample
        return scheduler.step(prediction, timestep, latents, **extra).prev_sample


def random_schedule(keeps_history=True, device="cpu"):
    """Random coefficients for three steps; the first reads neither history nor noise."""
    table = torch.randn(3, 8, device=device)
    table[:, 2] = 1.5
    table[0, 6:] = 0.0
    if not keeps_history:
        table[:, 6] = 0.0
    return StepSchedule("dpm++", table, (900, 500, 100), (False, True, True), keeps_history, 1.0)


# Elements per sample around the vectors of 8 and 16 and the blocks of 8192 and of the GPU; zero and one.
SHAPES = ((0, 4, 8, 8), (2, 0), (1, 1), (3, 7), (2, 4, 9, 9), (3, 4, 48, 48), (1, 8209))
DTYPES = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
)


def inputs(shape, dtypes, guided=True, device="cpu"):
    """latents, prediction, noise, history."""
    latents, noise = (torch.randn(shape, device=device).to(dtypes[0]) for _ in range(2))
    prediction = torch.randn(((2 if guided else 1) * shape[0], *shape[1:]), device=device).to(dtypes[1])
    return latents, prediction, noise, torch.randn(shape, device=device)


def type_names(value):
    return "-".join(str(d).removeprefix("torch.") for d in value) if isinstance(value, tuple) else None


def run_trajectory(name, device="cpu", implementation="auto"):
    """Every step from the same latents: by us, by diffusers in float32, by diffusers in float64."""
    scheduler, eta = ready(name)
    exact = in_float64(scheduler)
    schedule = step_schedule(scheduler, eta, device)
    scale, rescale = 4.0, 0.6
    latents, history = torch.randn(3, 4, 24, 24), None
    found = []
    for step, timestep in enumerate(scheduler.timesteps):
        prediction, noise = torch.randn(6, 4, 24, 24), torch.randn(3, 4, 24, 24)
        ours, history = guided_step(
            latents.to(device),
            prediction.to(device),
            schedule,
            step,
            scale,
            rescale,
            noise.to(device),
            history,
            implementation,
        )
        theirs = []
        for each, dtype in ((scheduler, torch.float32), (exact, torch.float64)):
            unconditional, conditional = prediction.to(dtype).chunk(2)
            guided = unconditional + scale * (conditional - unconditional)
            guided = rescale_noise_cfg(guided, conditional, rescale)
            theirs.append(diffusers_step(each, guided, timestep, latents.to(dtype), noise.to(dtype), eta))
        found.append((ours.cpu(), *theirs))
        latents = theirs[1].float()
    return schedule, found


def compare(shape, dtypes, guided, per_sample=False, rescale=0.0, device="cpu", implementation="auto", trials=None):
    """Random steps by us, by the reference in the same dtypes, and by the reference in float64.

    Small tensors need several trials: the largest of a handful of rounding errors is luck, for eager as for us.
    """
    found = []
    elements = torch.Size(shape).numel()
    for _ in range(trials or (max(1, min(64, 1024 // elements)) if elements else 1)):
        schedule = random_schedule(device=device)
        for step in range(len(schedule)):
            latents, prediction, noise, history = inputs(shape, dtypes, guided, device)
            scale = 1 + torch.rand(shape[0], device=device) if per_sample else 7.5 if guided else 1.0
            rest = (step, scale, rescale, noise, history)
            ours = guided_step(latents, prediction, schedule, *rest, implementation)
            eager = reference.guided_step(latents, prediction, schedule.table, *rest)
            arguments = (latents, prediction, schedule.table, *rest)
            exact = reference.guided_step(*(x.double() if isinstance(x, torch.Tensor) else x for x in arguments))
            assert all(x.is_contiguous() for x in ours)
            found.append((ours, eager, exact))
    for output, name in enumerate(("latents", "history")):
        stacked = [torch.stack([results[k][output] for results in found]) for k in range(3)]
        assert_within_eager_error(*stacked, what=name)
