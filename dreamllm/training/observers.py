"""What may watch a run without changing it."""

from __future__ import annotations

from typing import Any, Protocol

from dreamllm.model import DreamLLM, DreamLLMProcessor


class RunObserver(Protocol):
    """Is told of every line of metrics and of every step.

    With several processes, all of them call `after_step` (a sharded model computes with all), and only the first one
    calls `line`.
    """

    def line(self, line: dict[str, Any]) -> None:
        """A line of metrics was written."""

    def after_step(self, stage: str, step: int, model: DreamLLM, processor: DreamLLMProcessor) -> None:
        """Step `step`, counted from 1, of `stage` is done. Must leave the model as it was."""

    def close(self) -> None:
        """The run ends, complete or not."""
