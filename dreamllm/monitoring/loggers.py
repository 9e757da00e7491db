"""Lines of metrics for TensorBoard and Weights & Biases."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from dreamllm.model import DreamLLM, DreamLLMProcessor

_NOT_CURVES = ("stage", "step", "steps", "seconds", "operations")


def scalars(line: dict[str, Any]) -> dict[str, float]:
    """What of a line of metrics is a curve, with the rates that people watch."""
    values = {key: value for key, value in line.items() if key not in _NOT_CURVES and isinstance(value, int | float)}
    if line["seconds"] > 0:
        for key in ("tokens", "pictures", "documents"):
            values[f"{key}_per_second"] = line[key] / line["seconds"]
    return {f"{line['stage']}/{key}": float(value) for key, value in values.items()}


class TensorBoard:
    """A `RunObserver` that writes event files into `run/tensorboard`. Needs the package tensorboard."""

    def __init__(self, run: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "settings for TensorBoard need the package tensorboard: pip install tensorboard"
            ) from error
        self._writer = SummaryWriter(str(run / "tensorboard"))

    def line(self, line: dict[str, Any]) -> None:
        for name, value in scalars(line).items():
            self._writer.add_scalar(name, value, line["step"])

    def needs_model(self, step: int) -> bool:
        return False

    def after_step(self, stage: str, step: int, model: DreamLLM, processor: DreamLLMProcessor) -> None:
        """Only lines of metrics are logged."""

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A `RunObserver` that logs to a project of Weights & Biases. Needs the package wandb.

    A resumed run goes on in the same place: its identity is kept in `run/wandb_id`.
    """

    def __init__(self, run: Path, project: str, configuration: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError("logging to Weights & Biases needs the package wandb: pip install wandb") from error
        identity = run / "wandb_id"
        known = identity.read_text(encoding="utf-8").strip() if identity.is_file() else secrets.token_hex(4)
        identity.write_text(known, encoding="utf-8")
        self._stages: set[str] = set()
        self._run = wandb.init(
            project=project, dir=str(run), id=known, resume="allow", name=run.resolve().name, config=configuration
        )

    def line(self, line: dict[str, Any]) -> None:
        if line["stage"] not in self._stages:  # its curves are over its own steps
            self._stages.add(line["stage"])
            self._run.define_metric(f"{line['stage']}/*", step_metric=f"{line['stage']}/step")
        self._run.log({**scalars(line), f"{line['stage']}/step": line["step"]})

    def needs_model(self, step: int) -> bool:
        return False

    def after_step(self, stage: str, step: int, model: DreamLLM, processor: DreamLLMProcessor) -> None:
        """Only lines of metrics are logged."""

    def close(self) -> None:
        self._run.finish()
