"""How long one call takes: on the CPU by its clock, on a GPU by events.

On a GPU the host must be ahead, as it is inside a model: a kernel that only spins is queued before the first event, for
longer than the call's launches take, so that the kernels between the two events follow each other without waiting for
the host. A call that waits for the GPU itself (a peer that reads a result back) cannot be ahead; its waiting counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from dreamkernels.products import linear

Call = Callable[..., Any]
CYCLES_PER_US = 2000  # of a spinning kernel: no supported GPU's clock is much above 2 GHz
LONGEST_SPIN_US = 200_000.0
L2_SHARE = 4  # input sets together are this many times as large as the last-level cache


@dataclass(frozen=True)
class Times:
    """Of one contender, in microseconds."""

    minimum: float
    median: float
    low: float  # tenth percentile
    high: float  # ninetieth
    rounds: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Times:
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], samples[0], 1)
        tenths = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(min(samples), statistics.median(samples), tenths[0], tenths[-1], len(samples))


class CpuTimer:
    """Wall-clock time."""

    def prepare(self, name: str, call: Call, inputs: Sequence[Any]) -> None:
        """A call before those that count."""
        call(*inputs)

    def time(self, name: str, call: Call, inputs: Sequence[Any]) -> float:
        start = time.perf_counter()
        call(*inputs)
        return (time.perf_counter() - start) * 1e6

    def cold_bytes(self, wanted: int) -> int:
        return wanted

    def wait(self) -> None:
        """Until everything that was begun is done."""


class HostTimer(CpuTimer):
    """Wall-clock time until a GPU is done: what a user waits for, where the device waits for the host, too."""

    def time(self, name: str, call: Call, inputs: Sequence[Any]) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        call(*inputs)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e6

    def wait(self) -> None:
        torch.cuda.synchronize()


class CudaTimer:
    """GPU time between two events on the current stream."""

    def __init__(self) -> None:
        self._launch_us: dict[str, float] = {}

    def prepare(self, name: str, call: Call, inputs: Sequence[Any]) -> None:
        """A call before those that count, which tells how long its launches take."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        call(*inputs)
        launched = (time.perf_counter() - start) * 1e6
        torch.cuda.synchronize()
        # The first call of all compiles; the least of several is the launches.
        self._launch_us[name] = min(launched, self._launch_us.get(name, launched))

    def spin_cycles(self, name: str) -> int:
        """Twice the launches and a little, or as long as is reasonable."""
        return int(min(2 * self._launch_us[name] + 20, LONGEST_SPIN_US) * CYCLES_PER_US)

    def time(self, name: str, call: Call, inputs: Sequence[Any]) -> float:
        if name not in self._launch_us:
            self.prepare(name, call, inputs)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(self.spin_cycles(name))
        begin.record()
        call(*inputs)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3

    def cold_bytes(self, wanted: int) -> int:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return max(wanted, L2_SHARE * properties.L2_cache_size)

    def wait(self) -> None:
        torch.cuda.synchronize()


Timer: TypeAlias = CpuTimer | HostTimer | CudaTimer


def timer_for(device: str, end_to_end: bool = False) -> Timer:
    """`end_to_end`: by the host's clock on a GPU, too."""
    if device != "cuda":
        return CpuTimer()
    return HostTimer() if end_to_end else CudaTimer()


def matmul_gflops(device: str, size: int = 0, repeats: int = 5) -> dict[str, float]:
    """Of the fastest of some square matrix products, by dtype: what this machine reaches in arithmetic, in the library
    that is the fastest on it.

    `size` 0: large enough that the product is no longer bound by memory or by its launch.
    """
    size = size or (8192 if device == "cuda" else 2048)
    timer = timer_for(device)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        inputs = torch.randn(2, size, size, device=device).to(dtype).unbind()
        timer.prepare(str(dtype), linear, inputs)
        best = min(timer.time(str(dtype), linear, inputs) for _ in range(repeats))
        found[str(dtype).removeprefix("torch.")] = 2 * size**3 / best / 1e3
    return found


def cost_per_call_us(call: Call, inputs: Sequence[Any], calls: int = 4000) -> float:
    """Least mean time of one call over several batches; with tiny tensors this is the cost of the boundary.

    On a GPU of the launches: the host waits for nothing until a batch is over.
    """
    for _ in range(calls // 20):
        call(*inputs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(calls // 10):
            call(*inputs)
        best = min(best, (time.perf_counter() - start) / (calls // 10))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return best * 1e6
