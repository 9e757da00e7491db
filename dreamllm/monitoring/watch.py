"""Who watches a run, by settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamllm.monitoring.loggers import TensorBoard, WeightsAndBiases
from dreamllm.monitoring.samples import SampleSettings, SampleWriter
from dreamllm.training import RunObserver


@dataclass(frozen=True)
class LogSettings:
    """Where lines of metrics go besides metrics.jsonl.

    Attributes:
        tensorboard: event files in the run's subfolder tensorboard.
        wandb: project of Weights & Biases.
    """

    tensorboard: bool = False
    wandb: str | None = None


def watching(
    run: Path, samples: SampleSettings, logs: LogSettings, configuration: dict[str, Any]
) -> Callable[[bool], Sequence[RunObserver]]:
    """What `dreamllm.training.run` makes its observers with. `configuration` is shown beside the curves."""

    def make(main: bool) -> list[RunObserver]:
        found: list[RunObserver] = []
        if samples.every:
            found.append(SampleWriter(run, samples, writes=main))
        if main and logs.tensorboard:
            found.append(TensorBoard(run))
        if main and logs.wandb is not None:
            found.append(WeightsAndBiases(run, logs.wandb, configuration))
        return found

    return make
