"""The engine: writing beside transformers' `generate`, mixed requests and candidates beside one call after another."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import Deferred, NotHereError
from benchmarks.models.inference import inference_workloads
from benchmarks.models.setting import Setting

FAMILY = "models"
SHAPES = {"small": "mini", "working": "7b"}  # of dreamllm.workloads
STEPS = {"small": 10, "working": 50}  # of denoising beside itself; fewer change little but the time it takes


def cases(device: str, size: str) -> Iterator[Deferred]:
    if device == "cpu" and size == "working":
        raise NotHereError("the 7b needs a GPU with 80 GB; --size small has the same workloads at mini")
    for name, make in inference_workloads(Setting.usual(SHAPES[size], device), STEPS[size]).items():
        yield Deferred(f"{SHAPES[size]} {name}", make)


def boundary(device: str) -> dict[str, float]:
    return {}
