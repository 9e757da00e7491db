"""A run: its stages one after the other, each continued where it stopped."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dreamllm.data import LatentCache
from dreamllm.model import DreamLLM, DreamLLMProcessor
from dreamllm.model.codec import load_codec, vae_fingerprint
from dreamllm.training.configuration import FREE_TO_CHANGE, RunConfig, RunSettings, StageConfig
from dreamllm.training.distributed import Processes, processes
from dreamllm.training.errors import TrainingInterrupted
from dreamllm.training.export import gather_trained, save_whole
from dreamllm.training.files import make_folder, write_folder, write_json
from dreamllm.training.folder import claim_folder, versions
from dreamllm.training.interrupt import InterruptRequest
from dreamllm.training.loading import empty_model
from dreamllm.training.observers import RunObserver
from dreamllm.training.progress import quiet_transformers, say
from dreamllm.training.sharding import ShardedModel, compile_layers, shards
from dreamllm.training.stage import StageResult, StageTrainer
from dreamllm.training.step import Pass

DONE, MODEL, CONFIG = "done.json", "model", "run.json"


def run(
    config: RunConfig,
    console: Console | None = None,
    observers: Callable[[bool], Sequence[RunObserver]] = lambda main: (),
) -> Path:
    """Trains all stages and returns the folder of the final model, `config.out / "model"`.

    Each stage leaves `out/<stage>/model` (the last one `out/model`), loadable with `DreamLLM.from_pretrained` and
    `DreamLLMProcessor.from_pretrained`. A stage that is complete is not run again; one that was interrupted, even by
    kill -9, goes on from its last checkpoint and ends with the same bits as if it had not been.

    `observers` makes those that watch the run, in every process, once the run's folder exists; it is told whether this
    is the process that writes.

    Started by torchrun, all processes share the work; the main one prints and writes. The run may go on with another
    number of them.

    Raises `TrainingInterrupted` after Ctrl-C or SIGTERM (state saved), `ConfigurationChangedError`, `SaveError`,
    `NonFiniteLossError`, `TooManyBadSamplesError`, `ProcessLostError` when another process was killed, and `ValueError`
    when the processes cannot share a stage's micro-batches.
    """
    settings = config.settings
    with processes(settings.device, grouped=settings.sharding != "none") as these:
        shown = (console or Console()) if these.main else Console(quiet=True)
        for stage in config.stages:
            these.lanes(stage.micro_batches)

        def claim() -> None:
            make_folder(config.out)
            claim_folder(config.out / CONFIG, config.describe(), FREE_TO_CHANGE, lambda text: say(shown, text))

        these.on_main(claim)
        with (
            _threads(settings.num_threads),
            quiet_transformers(),
            InterruptRequest() as interrupt,
            _closing(observers(these.main)) as watching,
        ):
            _Run(config, shown, these, watching).stages(interrupt)
        say(shown, f"the model is in {config.out / MODEL}")
    return config.out / MODEL


class _Run:
    def __init__(
        self, config: RunConfig, console: Console, processes: Processes, observers: Sequence[RunObserver]
    ) -> None:
        self.config, self.console, self.processes, self.observers = config, console, processes, observers
        self.source = config.model
        self.metrics_bytes = 0
        self.loaded: tuple[DreamLLM, DreamLLMProcessor] | None = None

    def stages(self, interrupt: InterruptRequest) -> None:
        for number, stage in enumerate(self.config.stages):
            found = self._summary(stage)
            if found is not None:
                self.metrics_bytes = found["metrics_bytes"]
                say(self.console, f"{stage.name} is complete")
            else:
                self._train(stage, interrupt)
            self.source = self._model_folder(number)
            if number + 1 < len(self.config.stages) and self.processes.any(interrupt.requested):
                say(self.console, f"\nstopped after {stage.name}; rerun the same command to resume")
                raise TrainingInterrupted

    def _summary(self, stage: StageConfig) -> dict[str, Any] | None:
        """What a complete stage left. Read by one process: another node's file system may know of it later."""
        done = self.config.out / stage.name / DONE
        return self.processes.on_main(lambda: json.loads(done.read_text()) if done.is_file() else None)

    def _train(self, stage: StageConfig, interrupt: InterruptRequest) -> None:
        if self.processes.main:
            make_folder(self.config.out / stage.name)
        if self.loaded is None:
            self.loaded = _load(self.source, self.config.settings, shards(self.config.settings, self.processes))
        trainer = StageTrainer(
            self.config,
            stage,
            *self.loaded,
            self.metrics_bytes,
            self.console,
            self.processes,
            self.observers,
            self._latents(),
            self.source,
        )
        result = trainer.run(interrupt)
        self._finish(stage, result, trainer.through)
        trainer.checkpoints.remove()
        self.metrics_bytes = result.metrics_bytes
        if isinstance(trainer.through, ShardedModel):
            self.loaded = None

    def _latents(self) -> LatentCache | None:
        """The cache that the settings name. Raises `LatentCacheError` when it was made for another VAE or transform."""
        settings = self.config.settings
        if settings.latents is None:
            return None
        assert self.loaded is not None
        vae = vae_fingerprint(load_codec(self.config.model))  # as stored: the loaded one may have been cast
        return LatentCache(settings.latents, vae, self.loaded[1].describe_target(), settings.missing_latents)

    def _finish(self, stage: StageConfig, result: StageResult, through: Pass) -> None:
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
        trained = gather_trained(through, self.processes.main)

        def fill(folder: Path) -> None:
            if trained is None:
                model.save_pretrained(folder)
            else:
                save_whole(folder, model, trained, self.source)
            processor.save_pretrained(folder)
            write_json(folder / "training.json", {**summary, "configuration": stage.describe()})

        def write() -> None:
            write_folder(self._model_folder(number), fill, f"the model of {stage.name}")
            write_json(self.config.out / stage.name / DONE, summary)
            if number and not self.config.settings.keep_stage_models:
                shutil.rmtree(self._model_folder(number - 1), ignore_errors=True)

        self.processes.on_main(write)

    def _model_folder(self, number: int) -> Path:
        if number + 1 == len(self.config.stages):
            return self.config.out / MODEL
        return self.config.out / self.config.stages[number].name / MODEL


def _load(folder: Path, settings: RunSettings, sharded: bool) -> tuple[DreamLLM, DreamLLMProcessor]:
    """The model to train, and its processor; one that will be sharded comes without contents."""
    dtype = torch.bfloat16 if settings.precision == "pure_bfloat16" else torch.float32
    processor = DreamLLMProcessor.from_pretrained(folder)
    if sharded:
        return empty_model(folder, dtype), processor
    model: Any = DreamLLM.from_pretrained(folder, dtype=dtype)
    model.use_fused_operators(settings.fused_operators)
    if settings.compile_layers:
        compile_layers(model)
    return model, processor


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _closing(observers: Sequence[RunObserver]) -> Iterator[Sequence[RunObserver]]:
    try:
        yield observers
    finally:
        for observer in observers:
            observer.close()
