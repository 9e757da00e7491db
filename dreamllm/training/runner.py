"""A run: its stages one after the other, each continued where it stopped."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dreamllm.model import DreamLLM, DreamLLMProcessor
from dreamllm.training.configuration import FREE_TO_CHANGE, RunConfig, RunSettings, StageConfig
from dreamllm.training.errors import TrainingInterrupted
from dreamllm.training.files import make_folder, write_folder, write_json
from dreamllm.training.folder import claim_folder, versions
from dreamllm.training.interrupt import InterruptRequest
from dreamllm.training.progress import quiet_transformers, say
from dreamllm.training.stage import StageResult, StageTrainer

DONE, MODEL, CONFIG = "done.json", "model", "run.json"


def run(config: RunConfig, console: Console | None = None) -> Path:
    """Trains all stages and returns the folder of the final model, `config.out / "model"`.

    Each stage leaves `out/<stage>/model` (the last one `out/model`), loadable with `DreamLLM.from_pretrained` and
    `DreamLLMProcessor.from_pretrained`. A stage that is complete is not run again; one that was interrupted, even by
    kill -9, goes on from its last checkpoint and ends with the same bits as if it had not been.

    Raises `TrainingInterrupted` after Ctrl-C or SIGTERM (state saved), `ConfigurationChangedError`, `SaveError`,
    `NonFiniteLossError`, `TooManyBadSamplesError`.
    """
    console = console or Console()
    make_folder(config.out)
    claim_folder(config.out / CONFIG, config.describe(), FREE_TO_CHANGE, lambda text: say(console, text))
    with _threads(config.settings.num_threads), quiet_transformers(), InterruptRequest() as interrupt:
        _Run(config, console).stages(interrupt)
    say(console, f"the model is in {config.out / MODEL}")
    return config.out / MODEL


class _Run:
    def __init__(self, config: RunConfig, console: Console) -> None:
        self.config, self.console = config, console
        self.source = config.model
        self.metrics_bytes = 0
        self.loaded: tuple[DreamLLM, DreamLLMProcessor] | None = None

    def stages(self, interrupt: InterruptRequest) -> None:
        for number, stage in enumerate(self.config.stages):
            done = self.config.out / stage.name / DONE
            if done.is_file():
                self.metrics_bytes = json.loads(done.read_text())["metrics_bytes"]
                say(self.console, f"{stage.name} is complete")
            else:
                self._train(stage, interrupt)
            self.source = self._model_folder(number)
            if interrupt.requested and number + 1 < len(self.config.stages):
                say(self.console, f"\nstopped after {stage.name}; rerun the same command to resume")
                raise TrainingInterrupted

    def _train(self, stage: StageConfig, interrupt: InterruptRequest) -> None:
        folder = self.config.out / stage.name
        make_folder(folder)
        if self.loaded is None:
            self.loaded = _load(self.source, self.config.settings)
        trainer = StageTrainer(self.config, stage, *self.loaded, self.metrics_bytes, self.console)
        result = trainer.run(interrupt)
        self._finish(stage, result)
        trainer.checkpoints.remove()
        self.metrics_bytes = result.metrics_bytes

    def _finish(self, stage: StageConfig, result: StageResult) -> None:
        """Writes the stage's model, then the file that says so."""
        number = self.config.stages.index(stage)
        summary: dict[str, Any] = {
            "stage": stage.name,
            "steps": stage.steps,
            "metrics_bytes": result.metrics_bytes,
            "data": result.problems.state_dict(),
            "versions": versions(),
        }

        assert self.loaded is not None
        model, processor = self.loaded

        def fill(folder: Path) -> None:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            write_json(folder / "training.json", {**summary, "configuration": stage.describe()})

        write_folder(self._model_folder(number), fill, f"the model of {stage.name}")
        write_json(self.config.out / stage.name / DONE, summary)
        if number and not self.config.settings.keep_stage_models:
            shutil.rmtree(self._model_folder(number - 1), ignore_errors=True)

    def _model_folder(self, number: int) -> Path:
        if number + 1 == len(self.config.stages):
            return self.config.out / MODEL
        return self.config.out / self.config.stages[number].name / MODEL


def _load(folder: Path, settings: RunSettings) -> tuple[DreamLLM, DreamLLMProcessor]:
    device = "cuda" if settings.device == "auto" and torch.cuda.is_available() else settings.device
    model: Any = DreamLLM.from_pretrained(folder, dtype=torch.float32)
    model.use_fused_operators(settings.fused_operators)
    return model.to("cpu" if device == "auto" else device), DreamLLMProcessor.from_pretrained(folder)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
