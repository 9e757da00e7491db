"""The loop of one stage: batches by number, steps, metrics, checkpoints, and a defined end whatever happens."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dreamllm.data import Batches, LoadedBatch, LoaderSettings, Mixture, ProblemLog, derive_seed, load_batches
from dreamllm.documents import PackedBatch
from dreamllm.model import DreamLLM, DreamLLMProcessor
from dreamllm.training.checkpoints import StageCheckpoints
from dreamllm.training.configuration import RunConfig, StageConfig, learning_rate
from dreamllm.training.errors import NonFiniteLossError, SaveError, TrainingInterrupted
from dreamllm.training.interrupt import InterruptRequest
from dreamllm.training.metrics import (
    MetricsFile,
    Readback,
    StepRecord,
    interval_line,
    record_from_json,
    record_to_json,
)
from dreamllm.training.progress import StageProgress, describe_line, say
from dreamllm.training.step import count, make_optimizer, prepare_model, train_step

RANK = 0


@dataclass
class StageResult:
    """Where the metrics file stood when the stage was complete, and what was wrong with its data."""

    metrics_bytes: int
    problems: ProblemLog


class StageTrainer:
    """Trains `model` in place through one stage of `config`. `metrics_bytes`: size of the metrics before the stage."""

    def __init__(
        self,
        config: RunConfig,
        stage: StageConfig,
        model: DreamLLM,
        processor: DreamLLMProcessor,
        metrics_bytes: int,
        console: Console,
    ) -> None:
        self.config, self.stage, self.model, self.console = config, stage, model, console
        self.settings = config.settings
        self.folder = config.out / stage.name
        self.device = model.device
        self.batches = self._batches(processor)
        self.optimizer = make_optimizer(prepare_model(model, stage), stage)
        model.use_less_memory(self.settings.recompute_layers, self.settings.pictures_per_pass)
        self.checkpoints = StageCheckpoints(
            self.folder, self.settings.keep_checkpoints, lambda text: say(console, text)
        )
        self.metrics = MetricsFile(config.out / "metrics.jsonl")
        self.problems = ProblemLog(self.settings.max_bad_fraction)
        self.readback = Readback()
        self.interval: list[StepRecord] = []
        self.elapsed = self.line_elapsed = 0.0
        self.done = 0
        self.metrics_bytes = metrics_bytes

    def _batches(self, processor: DreamLLMProcessor) -> Batches:
        stage = self.stage
        mixture = Mixture(stage.data, derive_seed(self.config.seed, stage.name, "data"))
        loader = LoaderSettings(
            documents_per_batch=stage.documents_per_step // stage.accumulation,
            with_null=stage.condition_dropout > 0,
            flip_targets=stage.flip_targets,
            max_consecutive_bad=self.settings.max_consecutive_bad,
        )
        return Batches(mixture, processor, loader)

    def run(self, interrupt: InterruptRequest) -> StageResult:
        """Goes on from the newest checkpoint, or begins, and returns when all steps are done.

        Raises `TrainingInterrupted` after saving when `interrupt` was requested, `NonFiniteLossError` after storing the
        batch, `SaveError`, and `TooManyBadSamplesError`.
        """
        self._resume()
        self.clock = time.monotonic() - self.elapsed
        with StageProgress(self.console, self.stage.name, self.stage.steps, self.done) as progress:
            for micro_batches in self._steps():
                self._step(micro_batches)
                progress.advance()
                self._log(progress)
                if self.done == self.stage.steps:
                    break
                if interrupt.requested:
                    self._stop(progress)
                if self.done % self.settings.checkpoint_every == 0:
                    self._save(progress)
            self._log(progress, everything=True)
        if self.problems.counts:
            say(
                self.console, f"{self.stage.name}: {self.problems.bad} samples were left out\n{self.problems.summary()}"
            )
        return StageResult(self.metrics.sync(), self.problems)

    # -- steps ---------------------------------------------------------------------------------------------------------

    def _steps(self) -> Iterator[list[LoadedBatch]]:
        each = self.stage.accumulation
        loaded = load_batches(
            self.batches,
            self.done * each,
            self.stage.steps * each,
            self.settings.workers,
            pin_memory=self.device.type == "cuda",
        )
        with contextlib.closing(loaded):
            for _ in range(self.done, self.stage.steps):
                yield [next(loaded) for _ in range(each)]

    def _step(self, micro_batches: list[LoadedBatch]) -> None:
        for loaded in micro_batches:
            self.problems.add(loaded.batch.num_documents, loaded.problems)
        rate = learning_rate(self.stage, self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        seed = derive_seed(self.config.seed, self.stage.name, "step", self.done, RANK)
        torch.manual_seed(seed)  # for dropout, where a component has it
        generator = torch.Generator(self.device).manual_seed(seed)
        batches = [loaded.batch.to(self.device, non_blocking=True) for loaded in micro_batches]
        losses = train_step(self.model, self.optimizer, batches, self.stage, generator, self._autocast())
        self.done += 1
        self.elapsed = time.monotonic() - self.clock
        bad = sum(not problem.kept for loaded in micro_batches for problem in loaded.problems)
        counts = replace(count(batches), bad=bad)
        if not self.stage.weights[0]:  # the language loss is not computed
            counts = replace(counts, targets=0)
        self.readback.add(self.done, self.elapsed, rate, counts, losses)

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.settings.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    # -- metrics -------------------------------------------------------------------------------------------------------

    def _log(self, progress: StageProgress, everything: bool = False) -> None:
        """At the end of an interval, writes the lines of those before it; with `everything`, all that are due."""
        if not everything:
            if self.done % self.settings.log_every:
                return
            self.readback.start()
        for record in self.readback.take(everything):
            self._check_finite(record)
            self.interval.append(record)
            if record.step % self.settings.log_every == 0 or record.step == self.stage.steps:
                self._write_line(progress)

    def _write_line(self, progress: StageProgress) -> None:
        line = interval_line(self.stage.name, self.interval, self.line_elapsed)
        self.metrics.append(line)
        progress.show(line["step"], describe_line(line))
        self.line_elapsed = self.interval[-1].elapsed
        self.interval = []

    def _check_finite(self, record: StepRecord) -> None:
        """NaN or infinity: stores the batch, made once more from its number, and raises."""
        if record.finite:
            return
        each = self.stage.accumulation
        numbers = range((record.step - 1) * each, record.step * each)
        batches = [self.batches[number].batch for number in numbers]
        names = [name for batch in batches for name in batch.names]
        documents = _shown(names)
        values = (
            f"language {record.lm_loss:g}, diffusion {record.vm_loss:g}, total {record.loss:g}, "
            f"gradient norm {record.grad_norm:g}"
        )
        where = f"stage {self.stage.name}, step {record.step}: the loss is not finite ({values})"
        path = self.folder / f"bad_batch_step_{record.step:06d}.pt"
        try:
            torch.save({**record_to_json(record), "stage": self.stage.name, "batches": _plain(batches)}, path)
        except (OSError, RuntimeError) as error:
            raise NonFiniteLossError(f"{where}; its batch ({documents}) could not be saved: {error}") from error
        raise NonFiniteLossError(
            f"{where}. Its {len(names)} documents ({documents}) are stored in {path}. Look at them, or lower "
            f"learning_rate ({self.stage.learning_rate:g}), and train into a new folder"
        )

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        state = self.checkpoints.restore(self.model, self.optimizer)
        if state is not None:
            self.done = state["step"]
            self.metrics_bytes = state["metrics_bytes"]
            self.problems.load_state_dict(state["problems"])
            self.interval = [record_from_json(values) for values in state["interval"]]
            self.elapsed, self.line_elapsed = state["elapsed"], state["line_elapsed"]
        self.metrics.cut(self.metrics_bytes)

    def _save(self, progress: StageProgress) -> None:
        self._log(progress, everything=True)  # so that no checkpoint holds a step whose loss was not finite
        state: dict[str, Any] = {
            "metrics_bytes": self.metrics.sync(),
            "problems": self.problems.state_dict(),
            "interval": [record_to_json(record) for record in self.interval],
            "elapsed": self.elapsed,
            "line_elapsed": self.line_elapsed,
        }
        self.checkpoints.save(self.done, self.model, self.optimizer, state)

    def _stop(self, progress: StageProgress) -> None:
        try:
            self._save(progress)
        except SaveError as error:
            say(self.console, str(error))
        else:
            where = f"saved in {self.checkpoints.path(self.done)}"
            say(self.console, f"\nstopped after step {self.done} of {self.stage.name}, {where}")
        say(self.console, "rerun the same command to resume")
        raise TrainingInterrupted


def _shown(names: list[str]) -> str:
    return f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"


def _plain(batches: list[PackedBatch]) -> list[dict[str, Any]]:
    """Batches as dictionaries that `torch.load(weights_only=True)` reads."""
    return [{f.name: getattr(batch, f.name) for f in fields(batch)} for batch in batches]


def load_stored_batch(path: str | Path) -> tuple[dict[str, Any], list[PackedBatch]]:
    """Reads the file of a batch whose loss was not finite: (step, stage, losses), and its packed batches."""
    stored = torch.load(path, weights_only=True)
    batches = [PackedBatch(**{**values, "names": tuple(values["names"])}) for values in stored.pop("batches")]
    return stored, batches
