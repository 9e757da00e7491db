"""DreamLLM's workloads at size mini against the original's pattern, eager and under torch.compile.

`python -m benchmarks.models` runs the same cases and counts samples.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import Case
from benchmarks.models.workloads import workloads

FAMILY = "dreamllm"


def cases(device: str) -> Iterator[Case]:
    if device != "cpu":
        raise ValueError(f"the workloads of DreamLLM are prepared on the CPU only, not on {device}")
    for make in workloads("mini").values():
        torch._dynamo.reset()
        yield make()


def boundary(device: str) -> dict[str, float]:
    return {}
