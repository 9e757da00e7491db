"""The scalars of every denoising step of a diffusers scheduler, as one table.

All supported schedulers are one formula: with x the latents, m the model's (guided) prediction,

    x0 = clip(a x + b m, -limit, limit)                             the predicted clean latents
    x' = c x0 + d x + e m + f (x0 of the step before) + g noise     the latents of the next step

A table row is (a, b, limit, c, d, e, f, g), made in float64 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

COEFFICIENTS = 8
Row = tuple[float, float, float, float, float, float, float, float]
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class UnsupportedScheduler(ValueError):  # noqa: N818 - it names the scheduler
    """A scheduler, or a setting of one, whose step is not the formula of `guided_step`; the message says which."""


@dataclass(frozen=True)
class StepSchedule:
    """A scheduler with its time steps set, ready for `guided_step`. Made by `step_schedule`.

    Attributes:
        kind: "ddpm", "ddim" or "dpm++".
        table: float32 [steps, 8], one row of scalars per step (module text).
        timesteps: what the model is told at each step.
        needs_noise: per step, whether it adds noise.
        keeps_history: whether a step needs what the one before it predicted (second-order solvers).
        init_noise_sigma: standard deviation of the latents that the first step expects.
    """

    kind: str
    table: torch.Tensor
    timesteps: tuple[int, ...]
    needs_noise: tuple[bool, ...]
    keeps_history: bool
    init_noise_sigma: float

    def __len__(self) -> int:
        return len(self.timesteps)

    def to(self, device: torch.device | str) -> StepSchedule:
        """The same schedule with its table on a device."""
        return replace(self, table=self.table.to(device))

    def new_history(self, latents: torch.Tensor) -> torch.Tensor | None:
        """What to give the first step as `history`: zeros where the schedule keeps one, else None."""
        if not self.keeps_history:
            return None
        return torch.zeros(latents.shape, dtype=torch.float32, device=latents.device)


def step_schedule(scheduler: Any, eta: float = 0.0, device: torch.device | str = "cpu") -> StepSchedule:
    """The steps of a diffusers scheduler after its `set_timesteps`, equal to calling its `step` on them in order.

    Supported: `DDPMScheduler` (Ho et al. 2020; variance fixed_small, fixed_small_log or fixed_large), `DDIMScheduler`
    (Song et al. 2021, with `eta` in [0, 1]), `DPMSolverMultistepScheduler` (Lu et al. 2022: dpmsolver++ and
    sde-dpmsolver++ of order 1 or 2), each with every timestep spacing, noise schedule, prediction type epsilon,
    v_prediction or sample, and sample clipping.

    Args:
        scheduler: the scheduler; it is only read.
        eta: noise of DDIM, 0 (none) to 1; the other schedulers take only 0.
        device: where the table is made; it must be that of the latents.

    Raises:
        UnsupportedScheduler: another scheduler, or a setting beyond the formula (dynamic thresholding, learned
            variance, ...); use the scheduler's own `step`.
        ValueError: `set_timesteps` was not called, or eta is out of range.
    """
    name = type(scheduler).__name__
    if name not in _ROWS:
        raise UnsupportedScheduler(f"{name} is not one of {', '.join(_ROWS)}")
    if scheduler.num_inference_steps is None and not getattr(scheduler, "custom_timesteps", False):
        raise ValueError(f"the {name} has no time steps yet; call its set_timesteps first")
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must be in [0, 1], not {eta}")
    if eta and name != "DDIMScheduler":
        raise ValueError(f"eta {eta} has no meaning for {name}; give 0, or take a DDIMScheduler")
    config = scheduler.config
    if config.thresholding:
        raise UnsupportedScheduler(f"{name} with thresholding=True sorts the values of every sample")
    if config.prediction_type not in PREDICTION_TYPES:
        raise UnsupportedScheduler(f"{name} with prediction_type {config.prediction_type!r}")
    rows: list[Row] = _ROWS[name](scheduler, eta)
    if not all(math.isfinite(value) for row in rows for value in (*row[:2], *row[3:])):
        raise UnsupportedScheduler(
            f"{name} has a step with an infinite coefficient (an epsilon prediction at zero signal-to-noise ratio?)"
        )
    return StepSchedule(
        kind={"DDPMScheduler": "ddpm", "DDIMScheduler": "ddim"}.get(name, "dpm++"),
        table=torch.tensor(rows, dtype=torch.float64).reshape(-1, COEFFICIENTS).float().to(device),
        timesteps=tuple(int(t) for t in scheduler.timesteps),
        needs_noise=tuple(row[-1] != 0.0 for row in rows),
        keeps_history=any(row[-2] != 0.0 for row in rows),
        init_noise_sigma=float(scheduler.init_noise_sigma),
    )


def _clean_prediction(prediction_type: str, signal: float, sigma: float) -> tuple[float, float]:
    """x0 = a x + b m, where x = signal x0 + sigma epsilon."""
    if prediction_type == "epsilon":
        return (1 / signal, -sigma / signal) if signal else (math.inf, -math.inf)
    return (signal, -sigma) if prediction_type == "v_prediction" else (0.0, 1.0)


def _noise_prediction(prediction_type: str, signal: float, sigma: float) -> tuple[float, float]:
    """epsilon = a x + b m."""
    if prediction_type == "epsilon":
        return 0.0, 1.0
    return (sigma, signal) if prediction_type == "v_prediction" else (1 / sigma, -signal / sigma)


def _limit(config: Any) -> float:
    return float(config.clip_sample_range) if config.clip_sample else math.inf


def _ddpm_rows(scheduler: Any, eta: float) -> list[Row]:
    """Ho et al. 2020, formulas 6 and 7."""
    config, alphas = scheduler.config, scheduler.alphas_cumprod.double().tolist()
    deviation = _DDPM_DEVIATIONS.get(scheduler.variance_type)
    if deviation is None:
        raise UnsupportedScheduler(f"DDPMScheduler with variance_type {scheduler.variance_type!r}")
    timesteps = [int(t) for t in scheduler.timesteps]
    rows = []
    for t, previous in zip(timesteps, [*timesteps[1:], -1], strict=True):
        a, before = alphas[t], alphas[previous] if previous >= 0 else 1.0
        alpha = a / before
        noise = deviation((1 - before) / (1 - a) * (1 - alpha), 1 - alpha) if t > 0 else 0.0
        clean = _clean_prediction(config.prediction_type, math.sqrt(a), math.sqrt(1 - a))
        from_clean = math.sqrt(before) * (1 - alpha) / (1 - a)
        from_latents = math.sqrt(alpha) * (1 - before) / (1 - a)
        rows.append((*clean, _limit(config), from_clean, from_latents, 0.0, 0.0, noise))
    return rows


# From the variance of the posterior and beta.
_DDPM_DEVIATIONS: dict[str, Callable[[float, float], float]] = {
    "fixed_small": lambda variance, beta: math.sqrt(max(variance, 1e-20)),
    "fixed_small_log": lambda variance, beta: math.sqrt(max(variance, 1e-20)),
    "fixed_large": lambda variance, beta: math.sqrt(beta),
}


def _ddim_rows(scheduler: Any, eta: float) -> list[Row]:
    """Song et al. 2021, formulas 12 and 16."""
    config, alphas = scheduler.config, scheduler.alphas_cumprod.double().tolist()
    stride = config.num_train_timesteps // scheduler.num_inference_steps
    rows = []
    for t in (int(t) for t in scheduler.timesteps):
        a = alphas[t]
        before = alphas[t - stride] if t >= stride else float(scheduler.final_alpha_cumprod)
        noise = eta * math.sqrt(max((1 - before) / (1 - a) * (1 - a / before), 0.0))
        signal, sigma = math.sqrt(a), math.sqrt(1 - a)
        clean = _clean_prediction(config.prediction_type, signal, sigma)
        direction = math.sqrt(max(1 - before - noise**2, 0.0))
        from_latents, from_prediction = (
            direction * w for w in _noise_prediction(config.prediction_type, signal, sigma)
        )
        rows.append((*clean, _limit(config), math.sqrt(before), from_latents, from_prediction, 0.0, noise))
    return rows


def _dpm_rows(scheduler: Any, eta: float) -> list[Row]:
    """Lu et al. 2022 (DPM-Solver++), formula 9 and algorithm 2; for sde-dpmsolver++ appendix B."""
    config = scheduler.config
    _refuse_dpm(scheduler)
    sigmas = scheduler.sigmas.double().tolist()
    steps = len(scheduler.timesteps)
    rows = []
    for k in range(steps):
        signal, sigma, log_snr = _amplitudes(sigmas[k])
        next_signal, next_sigma, next_log_snr = _amplitudes(sigmas[k + 1])
        h = next_log_snr - log_snr
        stochastic = config.algorithm_type == "sde-dpmsolver++"
        decay = math.exp(-2 * h if stochastic else -h)
        first = next_signal * (1 - decay)
        from_latents = next_sigma / sigma * (math.exp(-h) if stochastic else 1.0)
        noise = next_sigma * math.sqrt(1 - decay) if stochastic else 0.0
        now, before = first, 0.0
        if k > 0 and config.solver_order == 2 and not _first_order_at(scheduler, k):
            ratio = (log_snr - _amplitudes(sigmas[k - 1])[2]) / h
            # D1 = (x0 - x0 of the step before) / ratio
            if config.solver_type == "midpoint":
                change = 0.5 * first / ratio
            else:
                change = next_signal * (1 - (1 - decay) / (2 * h if stochastic else h)) / ratio
            now, before = first + change, -change
        clean = _clean_prediction(config.prediction_type, signal, sigma)
        rows.append((*clean, math.inf, now, from_latents, 0.0, before, noise))
    return rows


def _amplitudes(sigma: float) -> tuple[float, float, float]:
    """Signal and noise amplitude and half the logarithm of their ratio's square, where sigma is noise over signal."""
    signal = 1 / math.sqrt(sigma**2 + 1)
    return signal, sigma * signal, -math.log(sigma) if sigma else math.inf


def _first_order_at(scheduler: Any, k: int) -> bool:
    config, steps = scheduler.config, len(scheduler.timesteps)
    lower = config.euler_at_final or (config.lower_order_final and steps < 15) or config.final_sigmas_type == "zero"
    return k == steps - 1 and lower


def _refuse_dpm(scheduler: Any) -> None:
    config = scheduler.config
    if config.algorithm_type not in ("dpmsolver++", "sde-dpmsolver++"):
        raise UnsupportedScheduler(f"DPMSolverMultistepScheduler with algorithm_type {config.algorithm_type!r}")
    if config.solver_order > 2:
        raise UnsupportedScheduler(f"DPMSolverMultistepScheduler of order {config.solver_order} (1 and 2 are)")
    if config.variance_type is not None:
        raise UnsupportedScheduler(f"DPMSolverMultistepScheduler with variance_type {config.variance_type!r}")
    if config.use_flow_sigmas:
        raise UnsupportedScheduler("DPMSolverMultistepScheduler with use_flow_sigmas=True")
    timesteps = scheduler.timesteps.tolist()
    if len(timesteps) > 1 and timesteps[0] == timesteps[1]:
        raise UnsupportedScheduler("a DPMSolverMultistepScheduler that repeats its first time step would skip it")


_ROWS: dict[str, Callable[[Any, float], list[Row]]] = {
    "DDPMScheduler": _ddpm_rows,
    "DDIMScheduler": _ddim_rows,
    "DPMSolverMultistepScheduler": _dpm_rows,
}
