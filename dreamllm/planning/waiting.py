"""What a step waits for that is no operator's time: the GPU whose documents take longest."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

from dreamllm.data import derive_seed
from dreamllm.planning.batches import Filling, Load, draw_batches, load_of
from dreamllm.planning.estimate import DRIVERS, StepTime

TRIALS = 100
"""Steps that are drawn; their mean is then known to a percent or two."""


@cache
def group_loads(stage: str, size: str, filling: Filling) -> tuple[Load, ...]:
    """What the drawn batches hold."""
    return tuple(load_of(group) for group in draw_batches(stage, size, filling).groups)


def pass_seconds(time: StepTime, mean: Load, load: Load) -> float:
    """One micro-batch of `load`, of which `time` is that of the mean: each part in proportion to what drives it, but no
    faster than the host gives out operators."""

    def factor(part: str) -> float:
        driver = DRIVERS.get(part)
        usual = getattr(mean, driver) if driver else 0.0
        return getattr(load, driver) / usual if driver and usual else 1.0

    busy = sum(seconds * factor(part) for part, seconds in time.by_part.items())
    bound_by_host = time.seconds > sum(time.by_part.values()) * (1 + 1e-9)
    return max(busy, time.seconds) if bound_by_host else busy


def slowest_gpu_seconds(
    time: StepTime, mean: Load, loads: Sequence[Load], gpus: int, accumulation: int, every_pass: bool
) -> float:
    """By how much the slowest of `gpus` is behind the mean in a step, on average over drawn steps.

    `every_pass`: the GPUs meet in every one of a step's `accumulation` passes, as sharding makes them, not only at its
    end. The GPUs' passes are filled independently of each other, as the trainer and the original fill them.
    """
    if gpus == 1:
        return 0.0
    seconds = [pass_seconds(time, mean, load) for load in loads]
    rng = random.Random(derive_seed("slowest", gpus, accumulation))
    total = 0.0
    for _ in range(TRIALS):
        passes = [rng.choices(seconds, k=gpus) for _ in range(accumulation)]
        total += sum(map(max, passes)) if every_pass else max(map(sum, zip(*passes, strict=True)))
    return max(0.0, total / TRIALS - accumulation * sum(seconds) / len(seconds))
