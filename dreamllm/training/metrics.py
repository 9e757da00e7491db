"""Numbers of a run: read back from the device a few at a time, written as JSON lines."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamllm.training.errors import SaveError


@dataclass(frozen=True)
class StepCounts:
    """What a step held: sequence tokens, language targets, pictures to create, documents; samples left out for it; the
    operations that it needs (see `StepOperations`)."""

    tokens: int
    targets: int
    pictures: int
    documents: int
    bad: int = 0
    operations: int = 0


@dataclass(frozen=True)
class StepTimes:
    """When a step was and how fast it learned.

    `step` counts from 1; `elapsed` is the time in seconds that the stage had taken when the step had been given out,
    `waited` the part of it for which this process waited for the step's data.
    """

    step: int
    elapsed: float
    waited: float
    learning_rate: float


@dataclass(frozen=True)
class StepRecord:
    """One step's losses, on the host, with what they average over."""

    times: StepTimes
    counts: StepCounts
    lm_loss: float
    vm_loss: float
    loss: float
    grad_norm: float

    @property
    def step(self) -> int:
        return self.times.step

    @property
    def finite(self) -> bool:
        return all(math.isfinite(v) for v in (self.lm_loss, self.vm_loss, self.loss, self.grad_norm))


_Added = tuple[StepTimes, StepCounts, Tensor]


class Readback:
    """Collects the losses of steps as device tensors and brings them to the host without stalling the device.

    `add` every step; `start` begins the copy of what was added; `take` returns the records whose copy was begun before
    the last `start` (`take(everything=True)`: all), waiting only for those.
    """

    def __init__(self) -> None:
        self._added: list[_Added] = []
        self._copies: list[tuple[list[_Added], Tensor, torch.cuda.Event | None]] = []

    def add(self, times: StepTimes, counts: StepCounts, losses: Tensor) -> None:
        """losses: float32 [4] on the device: language, diffusion, total, gradient norm."""
        self._added.append((times, counts, losses))

    def start(self) -> None:
        if not self._added:
            return
        stacked = torch.stack([losses for *_, losses in self._added])
        event = None
        if stacked.is_cuda:
            host = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
            stacked = host.copy_(stacked, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._copies.append((self._added, stacked, event))
        self._added = []

    def take(self, everything: bool = False) -> list[StepRecord]:
        if everything:
            self.start()
        ready = self._copies if everything else self._copies[:-1]
        self._copies = [] if everything else self._copies[-1:]
        records = []
        for added, values, event in ready:
            if event is not None:
                event.synchronize()
            for (times, counts, _), row in zip(added, values.tolist(), strict=True):
                records.append(StepRecord(times, counts, *row))
        return records


def interval_line(
    stage: str, records: list[StepRecord], since: float, memory_bytes: int, peak: float | None = None
) -> dict[str, Any]:
    """One line of metrics: means over the tokens, pictures and steps of `records`.

    `lm_loss` and `vm_loss` are unweighted, None when nothing was there to average; `lr` and `step` are the last step's;
    `steps`, `tokens`, `pictures`, `documents` and `bad_documents` (samples left out) are sums over the interval.
    `skipped_steps` counts those that were not finite: they are in the sums, not in the means. `seconds` is the time
    since `since`, the elapsed time at the last line. `operations` are what the steps needed, `share_of_peak` their
    share of what the devices could have done in that time: `peak` operations per second together; None: unknown.
    """
    last = records[-1]
    usable = [r for r in records if r.finite]
    targets = sum(r.counts.targets for r in usable)
    drawn = sum(r.counts.pictures for r in usable)
    operations, seconds = sum(r.counts.operations for r in records), last.times.elapsed - since
    return {
        "stage": stage,
        "step": last.step,
        "steps": len(records),
        "skipped_steps": len(records) - len(usable),
        "loss": sum(r.loss for r in usable) / len(usable) if usable else None,
        "lm_loss": sum(r.lm_loss * r.counts.targets for r in usable) / targets if targets else None,
        "vm_loss": sum(r.vm_loss * r.counts.pictures for r in usable) / drawn if drawn else None,
        "lr": last.times.learning_rate,
        "grad_norm": sum(r.grad_norm for r in usable) / len(usable) if usable else None,
        "tokens": sum(r.counts.tokens for r in records),
        "pictures": sum(r.counts.pictures for r in records),
        "documents": sum(r.counts.documents for r in records),
        "bad_documents": sum(r.counts.bad for r in records),
        "operations": operations,
        "share_of_peak": round(operations / seconds / peak, 4) if peak and seconds > 0 else None,
        "seconds": round(seconds, 3),
        "data_seconds": round(sum(r.times.waited for r in records), 3),
        "memory_bytes": memory_bytes,
    }


def record_to_json(record: StepRecord) -> dict[str, Any]:
    return asdict(record)


def record_from_json(values: dict[str, Any]) -> StepRecord:
    times, counts = StepTimes(**values["times"]), StepCounts(**values["counts"])
    return StepRecord(**{**values, "times": times, "counts": counts})


def peak_memory(device: torch.device) -> int:
    """Bytes: on CUDA what the allocator had given out at most, elsewhere what this process had resident at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class MetricsFile:
    """`metrics.jsonl` of a run, cut back to where a checkpoint was when the run resumes there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: dict[str, Any]) -> None:
        """Raises `SaveError` when the line cannot be written."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            raise SaveError(f"{self.path} could not be written: {error}") from error

    def sync(self) -> int:
        """Makes the lines durable; returns the file's size in bytes."""
        if not self.path.exists():
            return 0
        with open(self.path, "ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def cut(self, size_bytes: int) -> None:
        """Forgets the lines after `size_bytes`."""
        if self.path.exists() and self.path.stat().st_size > size_bytes:
            os.truncate(self.path, size_bytes)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, or of the one in the run folder `path`."""
    path = Path(path)
    file = path / "metrics.jsonl" if path.is_dir() else path
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
