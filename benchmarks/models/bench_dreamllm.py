"""DreamLLM's workloads against the original's pattern, eager and under torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.harness import Case, Deferred, NotHereError
from benchmarks.models.setting import Setting
from benchmarks.models.workloads import workloads

FAMILY = "models"
SHAPES = {"small": "mini", "working": "7b"}  # of dreamllm.workloads
LAYERS = {"small": (), "working": (2, 6)}  # of stages that train a decoder which does not fit whole; see workloads


def cases(device: str, size: str) -> Iterator[Deferred]:
    if device == "cpu" and size == "working":
        raise NotHereError("the 7b needs a GPU with 80 GB; --size small has the same workloads at mini")
    setting = Setting.usual(SHAPES[size], device)
    for name, make in workloads(setting, layer_counts=LAYERS[size]).items():
        yield Deferred(f"{SHAPES[size]} {name}", lambda make=make: _fresh(make))


def _fresh(make: Callable[[], Case]) -> Case:
    torch._dynamo.reset()
    return make()


def boundary(device: str) -> dict[str, float]:
    return {}
