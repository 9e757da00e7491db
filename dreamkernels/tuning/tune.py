"""Tunes the entries of an architecture's launch table one after the other, each stored as soon as it is found."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dreamkernels.devices import load_device, trying, tuned
from dreamkernels.tuning.search import Found, Parameters, RejectedError, search
from dreamkernels.tuning.workloads import WORKING, Bucket, Call, Size, Workload, buckets_of

Timer = Callable[[Callable[[], Any]], float]
NO_TIME = "no time left"
# Largest difference to the shipped parameters' result, as a share of its largest value: sums in another order.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Outcome:
    """What became of one entry. `found` is None where it was not tuned; `reason` says why."""

    kernel: str
    bucket: Bucket
    found: Found | None
    reason: str = ""


class CudaTimer:
    """The median microseconds of a call, by events on the GPU, whose L2 cache is overwritten before every call."""

    def __init__(self, device: torch.device, seconds: float = 0.03) -> None:
        self._device = device
        self._seconds = seconds
        properties = torch.cuda.get_device_properties(device)
        self._flush = torch.empty(4 * properties.L2_cache_size, dtype=torch.int8, device=device)

    def _once(self, call: Callable[[], Any]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return 1e3 * begin.elapsed_time(end)

    def __call__(self, call: Callable[[], Any]) -> float:
        with torch.cuda.device(self._device):
            warm = [self._once(call) for _ in range(3)]
            repetitions = min(100, max(5, int(1e6 * self._seconds / max(min(warm), 1.0))))
            return statistics.median(self._once(call) for _ in range(repetitions))


def _tensors(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result.detach().clone()]
    return [tensor for part in result if part is not None for tensor in _tensors(part)]


def _differs(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    for mine, theirs in zip(found, expected, strict=True):
        scale = theirs.float().abs().amax() if theirs.numel() else torch.zeros(())
        allowed = TOLERANCE.get(theirs.dtype, 0.0) * scale
        # Written so that a NaN differs.
        if not bool(((mine.float() - theirs.float()).abs() <= allowed).all()):
            return True
    return False


class _Cost:
    """The cost of parameters: their time as a share of the shipped ones', the geometric mean over an entry's calls."""

    def __init__(self, kernel: str, shipped: Mapping[str, Any], calls: list[Call], timer: Timer) -> None:
        self._kernel, self._shipped, self._timer = kernel, shipped, timer
        self._calls = calls
        self._expected: list[list[torch.Tensor]] = []
        self.shipped_us: list[float] = []

    def __call__(self, parameters: Parameters) -> float:
        limits = {name: self._shipped[name] for name in tuned.LIMITS_OF_BUCKET if name in self._shipped}
        with trying(self._kernel, {**limits, **parameters}):
            try:
                results = [_tensors(call()) for call in self._calls]
            except Exception as error:  # Triton has many for what does not fit or compile
                raise RejectedError(f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}") from error
            if not self._expected:
                self._expected = results
            if any(_differs(*pair) for pair in zip(results, self._expected, strict=True)):
                raise RejectedError("the result differs")
            times = [self._timer(call) for call in self._calls]
        if not self.shipped_us:
            self.shipped_us = times
        ratios = [mine / theirs for mine, theirs in zip(times, self.shipped_us, strict=True)]
        return math.exp(statistics.fmean(math.log(ratio) for ratio in ratios))


def tune(
    workloads: Mapping[str, Workload],
    architecture: str,
    model: str,
    path: Path,
    timer: Timer,
    provenance: Mapping[str, str],
    device: str = "cuda",
    minutes: float = math.inf,
    again: bool = False,
    kernels: Iterable[str] | None = None,
    size: Size = WORKING,
) -> Iterator[Outcome]:
    """Tunes every entry of the named kernels (default: of all workloads) and yields what became of it.

    Entries that `path` holds for this GPU model already are left alone unless `again`. No entry is begun after
    `minutes`. Raises ValueError when `path` exists and is no such file.
    """
    begin = time.monotonic()
    known = tuned.parse(path, architecture).get(model, {"launch": {}}) if path.exists() else {"launch": {}}
    for kernel in workloads if kernels is None else kernels:
        entries = load_device(architecture).launch[kernel]
        for shipped, bucket in zip(entries, buckets_of(entries), strict=True):
            stored = [tuned.bucket_of(entry) for entry in known["launch"].get(kernel, ())]
            if tuned.bucket_of(shipped) in stored and not again:
                yield Outcome(kernel, bucket, None, "tuned before")
                continue
            if time.monotonic() - begin > 60 * minutes:
                yield Outcome(kernel, bucket, None, NO_TIME)
                continue
            cost: _Cost | None = None
            try:
                cost = _Cost(kernel, shipped, workloads[kernel].calls(bucket, device, size), timer)
                found = search(tuned.parameters_of(shipped), cost)
            except (RejectedError, RuntimeError, ValueError) as error:
                yield Outcome(kernel, bucket, None, f"failed: {error}")
                continue
            shares = {"shipped_us": [round(us, 2) for us in cost.shipped_us], "share": round(found.cost, 4)}
            limits = {name: shipped[name] for name in tuned.LIMITS_OF_BUCKET if name in shipped}
            entry = {**limits, **found.parameters, "measured": {**shares, "candidates": found.timed}}
            tuned.store(path, architecture, model, provenance, kernel, entry)
            yield Outcome(kernel, bucket, found)
