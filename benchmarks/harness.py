"""Timing that can be trusted on a shared machine.

Contenders of a case run interleaved in one process, taking turns in every round, so that a slow phase of the machine
hits all of them. With cold caches (the default, as between the layers of a large model) each call takes the next of
several input sets, together larger than the last-level cache. With warm caches (as between the layers of a small model)
each turn is a few calls in a row on one input set, of which the first is not counted. Every contender's result is
checked against the first one's before anything is timed. A case declares the bytes it must move. Its speed is a share
of the copy bandwidth measured in the same rounds with as many bytes.

Only ratios within one run mean something on a shared CPU. Reported are the minimum and the median.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Call = Callable[..., Any]


@dataclass
class Case:
    """One operator at one shape and dtype."""

    operator: str
    label: str  # such as "forward bfloat16 [2048, 1024]"
    make_inputs: Callable[[], Sequence[Any]]
    contenders: dict[str, Call]  # the first one is ours
    bytes_moved: int  # the least that must be read and written
    flops: int
    relative_tolerance: float
    device: str = "cpu"
    cold_bytes: int = 96 * 2**20  # input sets together
    memory: bool = False  # also measure the memory of every contender
    held_bytes: dict[str, int] = field(default_factory=dict)  # kept between calls by a contender, allocated by others
    samples: int = 0  # documents, pictures, ... of one call, where time per sample says more than time per call
    least_rounds: int = 5  # timed even if `seconds` are over
    fallible: tuple[str, ...] = ()  # contenders whose failure is a result: a row that says so


@dataclass
class Timing:
    contender: str
    minimum_us: float
    median_us: float


@dataclass
class Result:
    case: Case
    caches: str = "cold"
    timings: list[Timing] = field(default_factory=list)
    copy_minimum_us: float = 0.0
    peak_extra_bytes: dict[str, int] = field(default_factory=dict)  # by contender, where the case asks for it
    failures: dict[str, str] = field(default_factory=dict)  # by contender of `case.fallible`: why it was not timed

    def minimum(self, contender: str) -> float:
        return next(timing.minimum_us for timing in self.timings if timing.contender == contender)

    def seconds_per_sample(self, contender: str) -> float:
        """From the median: a sample of a long step is an average over many operations already."""
        timing = next(timing for timing in self.timings if timing.contender == contender)
        return timing.median_us / 1e6 / self.case.samples

    def share_of_copy_bandwidth(self, contender: str) -> float:
        return self.copy_minimum_us / self.minimum(contender)

    def record(self) -> dict[str, Any]:
        return {
            "operator": self.case.operator,
            "case": self.case.label,
            "device": self.case.device,
            "caches": self.caches,
            "bytes_moved": self.case.bytes_moved,
            "flops": self.case.flops,
            "copy_minimum_us": round(self.copy_minimum_us, 2),
            "contenders": {
                timing.contender: {
                    "minimum_us": round(timing.minimum_us, 2),
                    "median_us": round(timing.median_us, 2),
                    "share_of_copy_bandwidth": round(self.share_of_copy_bandwidth(timing.contender), 3),
                    **({"peak_extra_bytes": self.peak_extra_bytes[timing.contender]} if self.peak_extra_bytes else {}),
                    **self._per_sample(timing.contender),
                }
                for timing in self.timings
            },
            **({"failures": self.failures} if self.failures else {}),
        }

    def _per_sample(self, contender: str) -> dict[str, float]:
        if not self.case.samples:
            return {}
        seconds = self.seconds_per_sample(contender)
        return {"seconds_per_sample": round(seconds, 6), "samples_per_second": round(1 / seconds, 3)}


def _tensors(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result.detach()]
    return [tensor for part in result if part is not None for tensor in _tensors(part)]


def check_contenders(case: Case) -> dict[str, str]:
    """Raises AssertionError when contenders disagree beyond the case's tolerance, relative to the largest value.

    Returns the contenders of `case.fallible` that raised something else, with what they raised.
    """
    inputs = case.make_inputs()
    (first, ours), *others = case.contenders.items()
    expected = _tensors(ours(*inputs))
    failures = {}
    for name, call in others:
        try:
            results = _tensors(call(*inputs))
        except Exception as error:
            if name not in case.fallible:
                raise
            failures[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            continue
        for mine, theirs in zip(expected, results, strict=True):
            scale = theirs.float().abs().max().item() or 1.0
            difference = (mine.float() - theirs.float()).abs().max().item() / scale
            if difference > case.relative_tolerance:
                raise AssertionError(f"{case.operator} {case.label}: {first} and {name} differ by {difference:.2e}")
    return failures


def _clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _time_once(call: Call, inputs: Sequence[Any], device: str) -> float:
    start = _clock(device)
    call(*inputs)
    return (_clock(device) - start) * 1e6


def _input_sets(case: Case, caches: str) -> list[Sequence[Any]]:
    first = case.make_inputs()
    if caches == "warm":
        return [first]
    used = sum(t.numel() * t.element_size() for t in _tensors([v for v in first if isinstance(v, torch.Tensor)]))
    return [first] + [case.make_inputs() for _ in range(max(1, min(16, case.cold_bytes // max(used, 1))))]


def _copy_inputs(case: Case, caches: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    half = max(1, case.bytes_moved // 2)
    sets = 1 if caches == "warm" else max(2, min(16, case.cold_bytes // (2 * half)))
    return [tuple(torch.ones(2, half, dtype=torch.uint8, device=case.device).unbind()) for _ in range(sets)]  # type: ignore[misc]


WARM_CALLS = 4  # in a row, of which the first brings the inputs back into the caches and is not counted


def _turn(call: Call, inputs: Sequence[Any], case: Case, caches: str) -> list[float]:
    if caches == "cold":
        return [_time_once(call, inputs, case.device)]
    return [_time_once(call, inputs, case.device) for _ in range(WARM_CALLS)][1:]


def measure(case: Case, rounds: int = 60, seconds: float = 6.0, caches: str = "cold") -> Result:
    """Checks and times a case: `rounds` rounds, or as many as fit into `seconds` after the case's least."""
    assert caches in ("cold", "warm")
    failures = check_contenders(case)
    contenders = {name: call for name, call in case.contenders.items() if name not in failures}
    input_sets = _input_sets(case, caches)
    copies = _copy_inputs(case, caches)
    for call in contenders.values():
        for inputs in input_sets[:3] if case.least_rounds > 2 else []:  # long cases are warm from the check
            call(*inputs)
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    copy_samples: list[float] = []
    begin = time.perf_counter()
    for number in range(rounds):
        if number >= case.least_rounds and time.perf_counter() - begin > seconds:
            break
        for position, (name, call) in enumerate(contenders.items()):
            samples[name] += _turn(call, input_sets[(number + position) % len(input_sets)], case, caches)
        target, source = copies[number % len(copies)]
        copy_samples += _turn(target.copy_, (source,), case, caches)
    result = Result(case, caches, copy_minimum_us=min(copy_samples), failures=failures)
    if case.memory:
        result.peak_extra_bytes = {
            name: peak_extra_bytes(call, input_sets[0], case.device) + case.held_bytes.get(name, 0)
            for name, call in contenders.items()
        }
    result.timings = [Timing(name, min(values), statistics.median(values)) for name, values in samples.items()]
    return result


def peak_extra_bytes(call: Call, inputs: Sequence[Any], device: str) -> int:
    """The most memory that a call holds at one time beyond its inputs and its results (loss and gradients).

    On the CPU from the allocator's events in torch.profiler, so what libraries allocate for themselves is not seen; on
    CUDA from the caching allocator. Call once before: a first call compiles.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = call(*inputs)
        torch.cuda.synchronize()
        most = torch.cuda.max_memory_allocated() - before
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            results = call(*inputs)
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = most = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            most = max(most, held)
    return most - sum(tensor.numel() * tensor.element_size() for tensor in _tensors(results))


def matmul_gflops(device: str, size: int = 0, repeats: int = 5) -> dict[str, float]:
    """Of the fastest of some square matrix products, by dtype: what this machine reaches in arithmetic.

    `size` 0: large enough that the product is no longer bound by memory or by its launch.
    """
    size = size or (8192 if device == "cuda" else 2048)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2, size, size, device=device).to(dtype).unbind()
        torch.mm(a, b)
        best = min(_time_once(torch.mm, (a, b), device) for _ in range(repeats))
        found[str(dtype).removeprefix("torch.")] = 2 * size**3 / best / 1e3
    return found


def cost_per_call_us(call: Call, inputs: Sequence[Any], calls: int = 4000) -> float:
    """Least mean time of one call over several batches; with tiny tensors this is the cost of the boundary."""
    for _ in range(200):
        call(*inputs)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(calls // 10):
            call(*inputs)
        best = min(best, (time.perf_counter() - start) / (calls // 10))
    return best * 1e6
