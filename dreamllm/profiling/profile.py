"""Profiles the training step of a workload: times, operators, memory, synchronisations, and a trace for Perfetto."""

from __future__ import annotations

import contextlib
import operator
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, record_function

from dreamllm.data import Batches
from dreamllm.documents import PackedBatch
from dreamllm.profiling.parts import PartTracker
from dreamllm.profiling.synchronisation import HostSynchronisations
from dreamllm.profiling.workload import Precision, PreparedStep, Recording, prepare
from dreamllm.training import stage_batches
from dreamllm.training.metrics import StepCounts
from dreamllm.training.progress import StageProgress
from dreamllm.training.step import count
from dreamllm.workloads import make_processor, stage_config

TRACE = "trace.json"


@dataclass
class Repetitions:
    """A step's seconds when nothing observed it, and its recording, in turn: a machine that slows down slows both."""

    seconds: list[float] = field(default_factory=list)
    recordings: list[Recording] = field(default_factory=list)

    def add(self, seconds: float, recording: Recording) -> None:
        self.seconds.append(seconds)
        self.recordings.append(recording)

    @property
    def step_seconds(self) -> float:
        """The least: what disturbs a step only adds to it."""
        return min(self.seconds)

    @property
    def recording(self) -> Recording:
        """The last one, with the least of each operator's seconds."""
        found = [{(op.signature, op.part, op.phase): op.seconds for op in each.operators} for each in self.recordings]
        operators = [
            replace(op, seconds=min(each[op.signature, op.part, op.phase] for each in found))
            for op in self.recordings[-1].operators
        ]
        return replace(self.recordings[-1], operators=operators)

    @property
    def unattributed_seconds(self) -> float:
        """Of a step, not inside any operator: Python and autograd, or gaps between kernels. The median of what each
        step took beyond the operators recorded next to it: of the least times it would be what disturbs a whole step
        and not every operator."""
        inside = [sum(op.seconds for op in recording.operators) for recording in self.recordings]
        return max(0.0, statistics.median(map(operator.sub, self.seconds, inside)))


@dataclass
class Profile:
    """What was measured in `steps` repetitions; see `Repetitions`. `data_seconds`: the median of three batches."""

    workload: str
    size: str
    precision: Precision
    device: str
    threads: int
    steps: int
    counts: StepCounts
    step_seconds: float
    unattributed_seconds: float
    data_seconds: float
    recording: Recording
    synchronisations: list[str]
    trace: Path | None


def profile_workload(
    workload: str,
    size: str,
    precision: Precision = "float32",
    device: str = "cpu",
    documents_per_step: int | None = None,
    steps: int = 3,
    seed: int = 0,
    out: Path | None = None,
    console: Console | None = None,
) -> Profile:
    """Runs and observes the real training step of `workload` at `size`; writes `out/trace.json` when `out` is given.

    Raises `ValueError` for an unknown workload or size, and for fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    config = stage_config(workload, size, documents_per_step, seed=seed)
    loader = stage_batches(config, make_processor(size), seed)
    step = prepare(size, config, precision, device, seed=seed)
    with StageProgress(console or Console(quiet=True), f"profiling {config.name} {size}", 2 * steps + 3, 0) as progress:

        def ran() -> None:
            progress.advance()

        data_seconds, batch = _load(loader, device)
        step.run([batch])  # warm-up
        ran()
        with HostSynchronisations() as waits:
            step.run([batch])
        ran()
        repetitions = Repetitions()
        for _ in range(steps):
            repetitions.add(_timed(step, batch, ran), _recorded(step, batch, ran))
        trace = None if out is None else _write_trace(step, batch, out / TRACE)
        ran()
    return Profile(
        config.name,
        size,
        precision,
        device_name(device),
        torch.get_num_threads(),
        steps,
        count([batch]),
        repetitions.step_seconds,
        repetitions.unattributed_seconds,
        data_seconds,
        repetitions.recording,
        waits.summary(),
        trace,
    )


def _load(loader: Batches, device: str) -> tuple[float, PackedBatch]:
    """Seconds to make a batch (of three, the median), and the first batch on the device."""
    seconds = []
    for number in (2, 1, 0):
        begin = time.perf_counter()
        loaded = loader[number]
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds), loaded.batch.to(device)


def _timed(step: PreparedStep, batch: PackedBatch, done: Callable[[], None]) -> float:
    _wait(step)
    begin = time.perf_counter()
    step.run([batch])
    _wait(step)
    done()
    return time.perf_counter() - begin


def _recorded(step: PreparedStep, batch: PackedBatch, done: Callable[[], None]) -> Recording:
    recording = step.record(batch, batch.cu_seqlens.diff().tolist(), timed=True)
    done()
    return recording


def _wait(step: PreparedStep) -> None:
    if step.model.device.type == "cuda":
        torch.cuda.synchronize()


def _write_trace(step: PreparedStep, batch: PackedBatch, path: Path) -> Path:
    """A Chrome trace of one step with a range around each part of the model, forward and backward."""
    activities = [ProfilerActivity.CPU]
    if step.model.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler, _ranges(step):
        step.run([batch])
        _wait(step)
    profiler.export_chrome_trace(str(path))
    return path


@contextlib.contextmanager
def _ranges(step: PreparedStep) -> Iterator[None]:
    """Opens a named range in the trace whenever the step enters another part."""
    ranges: list[record_function] = []

    def change(part: str, phase: str) -> None:
        close()
        ranges.append(record_function(f"{part} {phase}"))
        ranges[-1].__enter__()

    def close() -> None:
        while ranges:
            ranges.pop().__exit__(None, None, None)

    with PartTracker(step.model, change):
        yield
        close()


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "CPU"
