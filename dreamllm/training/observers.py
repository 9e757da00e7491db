"""What may watch a run without changing it."""

from __future__ import annotations

from typing import Any, Protocol

from dreamllm.model import DreamLLM, DreamLLMProcessor


class RunObserver(Protocol):
    """Is told of every line of metrics and of every step.

    With several processes, all of them call `after_step`, and only the first one calls `line`.
    """

    def needs_model(self, step: int) -> bool:
        """Whether `after_step` reads or runs the model at this step, the same in all processes: a sharded one is then
        gathered."""

    def line(self, line: dict[str, Any]) -> None:
        """A line of metrics was written."""

    def after_step(self, stage: str, step: int, model: DreamLLM, processor: DreamLLMProcessor) -> None:
        """Step `step`, counted from 1, of `stage` is done. Must leave the model as it was."""

    def close(self) -> None:
        """The run ends, complete or not."""
