"""DreamLLM's workloads against the original's pattern, eager and under torch.compile; and its engine."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import Case, NotHereError
from benchmarks.models.inference import inference_workloads
from benchmarks.models.workloads import workloads

FAMILY = "models"
SHAPES = {"small": "mini", "working": "7b"}  # of dreamllm.workloads


def cases(device: str, size: str) -> Iterator[Case]:
    if device != "cpu" or size != "small":
        raise NotHereError("the original's pattern and its batches are prepared on the CPU only, at size mini")
    for make in (workloads(SHAPES[size]) | inference_workloads(SHAPES[size])).values():
        torch._dynamo.reset()
        yield make()


def boundary(device: str) -> dict[str, float]:
    return {}
