"""Timing that can be trusted on a shared machine.

Contenders of a case run interleaved in one process, taking turns in every round, so that a slow phase of the machine
hits all of them. With cold caches (the default, as between the layers of a large model) each call takes the next of
several input sets, together larger than the last-level cache. With warm caches (as between the layers of a small model)
each turn is a few calls in a row on one input set, of which the first is not counted. Every contender's result is
checked against the first one's before anything is timed. A case declares the bytes it must move. Its speed is a share
of the copy bandwidth measured in the same rounds with as many bytes.

Only ratios within one run mean something on a shared CPU. Reported are the minimum, the median and two quantiles.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.timing import Call, Timer, Times, cost_per_call_us, matmul_gflops, timer_for

__all__ = [
    "SIZES",
    "Call",
    "Case",
    "Deferred",
    "NotHereError",
    "Part",
    "Result",
    "cost_per_call_us",
    "matmul_gflops",
    "measure",
]

SIZES = ("small", "working")  # quick shapes; those of the 7b system
MOST_SETS = {"cpu": 16, "cuda": 64}


class NotHereError(Exception):
    """A benchmark that cannot run on this device or at this size, and why: a row of the results, no failure."""


@dataclass(frozen=True)
class Part:
    """A case that measures a part of what it is named after: `held` of `whole` of its `unit`, such as layers."""

    unit: str
    held: int
    whole: int

    @property
    def note(self) -> str:
        """To go before a label."""
        return f"{self.held} of {self.whole} {self.unit}, "


@dataclass
class Case:
    """One operator at one shape and dtype."""

    operator: str
    label: str  # such as "forward bfloat16 [2048, 1024]"
    make_inputs: Callable[[], Sequence[Any]]
    contenders: dict[str, Call]  # the first one is ours
    bytes_moved: int  # the least that must be read and written
    flops: int
    relative_tolerance: float | tuple[float, ...]  # of every result, or one for each
    device: str = "cpu"
    cold_bytes: int = 96 * 2**20  # input sets together, at least
    memory: bool = False  # also measure the memory of every contender; on a GPU it always is
    held_bytes: dict[str, int] = field(default_factory=dict)  # kept between calls by a contender, allocated by others
    samples: int = 0  # documents, pictures, ... of one call, where time per sample says more than time per call
    least_rounds: int = 5  # timed even if `seconds` are over
    fallible: tuple[str, ...] = ()  # contenders whose failure is a result: a row that says so
    # Other libraries' ways, or one phrase on why there is none. Checked like contenders, but a failure or a result of
    # their own is a row, too. They get copies of the inputs when checked, because some overwrite them.
    peers: Mapping[str, Call | str] = field(default_factory=dict)
    # Where contenders need not agree: what is wrong with one's results, "" if nothing.
    wrong: Callable[[list[torch.Tensor]], str] | None = None
    # On a GPU by the host's clock, until the device is done: a loop that chooses tokens or a step that reads its losses
    # keeps the device waiting, and that counts. Otherwise by the device's events.
    end_to_end: bool = False
    part: Part | None = None

    def without_compiled(self) -> Case:
        """Without the contenders that compile, which may take longer than everything else."""
        kept = {name: call for name, call in self.contenders.items() if "torch.compile" not in name}
        return dataclasses.replace(self, contenders=kept)

    def forgotten(self) -> Case:
        """Names without the calls, which hold models."""
        return dataclasses.replace(
            self, contenders=dict.fromkeys(self.contenders, _forgotten), peers=dict.fromkeys(self.peers, ""), wrong=None
        )


def _forgotten(*inputs: Any) -> Any:
    raise AssertionError("this contender was measured and forgotten")


@dataclass(frozen=True)
class Deferred:
    """A case that is made when it is its turn, because its models are large."""

    name: str
    make: Callable[[], Case]


@dataclass
class Timing:
    contender: str
    times: Times

    @property
    def minimum_us(self) -> float:
        return self.times.minimum

    @property
    def median_us(self) -> float:
        return self.times.median


@dataclass
class Result:
    case: Case
    caches: str = "cold"
    timings: list[Timing] = field(default_factory=list)
    copy_minimum_us: float = 0.0
    peak_extra_bytes: dict[str, int] = field(default_factory=dict)  # by contender, where it was measured
    failures: dict[str, str] = field(default_factory=dict)  # by contender: why it was not timed

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
            **({"part": dataclasses.asdict(self.case.part)} if self.case.part else {}),
            "bytes_moved": self.case.bytes_moved,
            "flops": self.case.flops,
            "copy_minimum_us": round(self.copy_minimum_us, 2),
            "contenders": {
                timing.contender: {
                    "minimum_us": round(timing.minimum_us, 2),
                    "median_us": round(timing.median_us, 2),
                    "tenth_and_ninetieth_percentile_us": [round(timing.times.low, 2), round(timing.times.high, 2)],
                    "rounds": timing.times.rounds,
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


def _copies(inputs: Sequence[Any]) -> list[Any]:
    """The same values in the same layout, so that a contender that overwrites them does no harm."""
    return [
        value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value
        for value in inputs
    ]


def _difference(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative to the largest value. NaN counts as infinitely wrong."""
    if mine.shape != theirs.shape:
        return float("inf")
    if not mine.numel():
        return 0.0
    b = theirs.to(mine.device).float()
    scale = b.abs().max().item() or 1.0
    found = (mine.float() - b).abs().max().item() / scale
    return found if found == found else float("inf")


def _too_different(case: Case, mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> tuple[float, float] | None:
    """Difference and tolerance of the worst result that is further off than allowed."""
    tolerance = case.relative_tolerance
    allowed = tolerance if isinstance(tolerance, tuple) else (tolerance,) * len(mine)
    found = [(_difference(a, b), limit) for a, b, limit in zip(mine, theirs, allowed, strict=True)]
    return max((pair for pair in found if pair[0] > pair[1]), default=None)


def _reason(error: Exception) -> str:
    """What was raised in one line; one that ends with a colon says nothing without the next."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["-"]
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {said}"


def check_contenders(case: Case) -> dict[str, str]:
    """Raises AssertionError when contenders disagree beyond the case's tolerance, relative to the largest value.

    Returns, by name, why some are not to be timed: contenders of `case.fallible` that raised something else, and peers
    that are not here, raised, or compute something else.
    """
    inputs = case.make_inputs()
    (first, ours), *others = case.contenders.items()
    expected = _tensors(ours(*inputs))
    _check_alone(case, first, expected)
    failures = {}
    for name, call in others:
        try:
            results = _tensors(call(*inputs))
        except Exception as error:
            if name not in case.fallible:
                raise
            failures[name] = _reason(error)
            continue
        if case.wrong is not None:
            _check_alone(case, name, results)
        elif worst := _too_different(case, expected, results):
            raise AssertionError(
                f"{case.operator} {case.label}: {first} and {name} differ by {worst[0]:.2e}, {worst[1]:.2e} is allowed"
            )
    for name, peer in case.peers.items():
        try:
            reason = peer if isinstance(peer, str) else _peer_problem(case, peer, inputs, expected)
        except Exception as error:  # whatever another library raises
            reason = _reason(error)
        if reason:
            failures[name] = reason
    return failures


def _check_alone(case: Case, name: str, results: list[torch.Tensor]) -> None:
    if case.wrong is not None and (why := case.wrong(results)):
        raise AssertionError(f"{case.operator} {case.label}: {name}: {why}")


def _peer_problem(case: Case, peer: Call, inputs: Sequence[Any], expected: list[torch.Tensor]) -> str:
    results = _tensors(peer(*_copies(inputs)))
    if len(results) != len(expected):
        return f"gives {len(results)} results instead of {len(expected)}"
    if worst := _too_different(case, expected, results):
        return f"its result differs by {worst[0]:.1e} of the largest value, {worst[1]:.0e} is allowed"
    return ""


def _input_sets(case: Case, caches: str, cold_bytes: int) -> list[Sequence[Any]]:
    first = case.make_inputs()
    used = sum(t.numel() * t.element_size() for t in _tensors([v for v in first if isinstance(v, torch.Tensor)]))
    if caches == "warm" or not used:
        return [first]
    more = max(1, min(MOST_SETS[case.device], cold_bytes // used))
    return [first] + [case.make_inputs() for _ in range(more)]


def _copy_inputs(case: Case, caches: str, cold_bytes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    half = max(1, case.bytes_moved // 2)
    sets = 1 if caches == "warm" else max(2, min(MOST_SETS[case.device], cold_bytes // (2 * half)))
    return [tuple(torch.ones(2, half, dtype=torch.uint8, device=case.device).unbind()) for _ in range(sets)]  # type: ignore[misc]


WARM_CALLS = 4  # in a row, of which the first brings the inputs back into the caches and is not counted


def _turn(timer: Timer, name: str, call: Call, inputs: Sequence[Any], caches: str) -> list[float]:
    if caches == "cold":
        return [timer.time(name, call, inputs)]
    return [timer.time(name, call, inputs) for _ in range(WARM_CALLS)][1:]


def _timed(case: Case, failures: Mapping[str, str]) -> dict[str, Call]:
    peers = {name: peer for name, peer in case.peers.items() if not isinstance(peer, str)}
    return {name: call for name, call in {**case.contenders, **peers}.items() if name not in failures}


def measure(case: Case, rounds: int = 60, seconds: float = 6.0, caches: str = "cold") -> Result:
    """Checks and times a case: `rounds` rounds, or as many as fit into `seconds` after the case's least."""
    assert caches in ("cold", "warm")
    timer = timer_for(case.device, case.end_to_end)
    failures = check_contenders(case)
    contenders = _timed(case, failures)
    cold_bytes = timer.cold_bytes(case.cold_bytes)
    input_sets = _input_sets(case, caches, cold_bytes)
    copies = _copy_inputs(case, caches, cold_bytes)
    for name, call in contenders.items():
        for inputs in input_sets[:3] if case.least_rounds > 2 else []:  # long cases are warm from the check
            timer.prepare(name, call, inputs)
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    copy_samples: list[float] = []
    begin = time.perf_counter()
    for number in range(rounds):
        if number >= case.least_rounds and time.perf_counter() - begin > seconds:
            break
        for position, (name, call) in enumerate(contenders.items()):
            samples[name] += _turn(timer, name, call, input_sets[(number + position) % len(input_sets)], caches)
        target, source = copies[number % len(copies)]
        copy_samples += _turn(timer, "copy", target.copy_, (source,), caches)
    result = Result(case, caches, copy_minimum_us=min(copy_samples), failures=failures)
    if case.memory or case.device == "cuda":
        result.peak_extra_bytes = {
            name: peak_extra_bytes(call, input_sets[0], case.device) + case.held_bytes.get(name, 0)
            for name, call in contenders.items()
        }
    result.timings = [Timing(name, Times.of(values)) for name, values in samples.items()]
    result.case = case.forgotten()
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
