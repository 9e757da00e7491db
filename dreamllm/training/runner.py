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
from torch import Tensor

from dreamllm.data import LatentCache
from dreamllm.model import DreamLLM, DreamLLMProcessor
from dreamllm.model.codec import load_codec, vae_fingerprint
from dreamllm.training.configuration import FREE_TO_CHANGE, Precision, RunConfig, RunSettings, StageConfig
from dreamllm.training.distributed import Processes, processes
from dreamllm.training.errors import TrainingInterrupted
from dreamllm.training.export import gather, save_whole
from dreamllm.training.files import make_folder, write_folder, write_json
from dreamllm.training.folder import claim_folder, versions
from dreamllm.training.interrupt import InterruptRequest
from dreamllm.training.loading import empty_model
from dreamllm.training.lora import merged, save_adapter
from dreamllm.training.observers import RunObserver
from dreamllm.training.progress import quiet_transformers, say
from dreamllm.training.sharding import ShardedModel, compile_layers, shards
from dreamllm.training.stage import StageResult, StageTrainer

DONE, MODEL, CONFIG, ADAPTER = "done.json", "model", "run.json", "adapter"


def run(
    config: RunConfig,
    console: Console | None = None,
    observers: Callable[[bool], Sequence[RunObserver]] = lambda main: (),
    peak: Callable[[torch.device, Precision], float | None] | None = None,
) -> Path:
    """Trains all stages and returns the folder of the final model, `config.out / "model"`.

    Each stage leaves `out/<stage>/model` (the last one `out/model`), loadable with `DreamLLM.from_pretrained` and
    `DreamLLMProcessor.from_pretrained`. A stage that is complete is not run again; one that was interrupted, even by
    kill -9, goes on from its last checkpoint and ends with the same bits as if it had not been.

    `observers` makes those that watch the run, in every process, once the run's folder exists; it is told whether this
    is the process that writes.

    `peak` gives the operations per second that a device could do, None when that is unknown: the operations of each
    step are then counted, and the share of the peak that the run reaches.

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
            limit = None if peak is None else these.on_main(lambda: peak(these.device, settings.precision))
            if peak is not None and limit is None:
                name = torch.cuda.get_device_name(these.device)
                say(shown, f"the peak of {name} is not known: operations per second are shown, not a share of it")
            every = None if limit is None else limit * these.world
            _Run(config, shown, these, watching, every, peak is not None).stages(interrupt)
        say(shown, f"the model is in {config.out / MODEL}")
    return config.out / MODEL


class _Run:
    def __init__(
        self,
        config: RunConfig,
        console: Console,
        processes: Processes,
        observers: Sequence[RunObserver],
        peak: float | None,
        counted: bool,
    ) -> None:
        self.peak, self.counted = peak, counted
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
            self.peak,
            self.counted,
        )
        result = trainer.run(interrupt)
        self._finish(stage, result, trainer)
        trainer.checkpoints.remove()
        self.metrics_bytes = result.metrics_bytes
        if isinstance(trainer.through, ShardedModel) or stage.lora is not None:
            self.loaded = None  # it is not as the next stage needs it

    def _latents(self) -> LatentCache | None:
        """The cache that the settings name. Raises `LatentCacheError` when it was made for another VAE or transform."""
        settings = self.config.settings
        if settings.latents is None:
            return None
        assert self.loaded is not None
        vae = vae_fingerprint(load_codec(self.config.model))  # as stored: the loaded one may have been cast
        return LatentCache(settings.latents, vae, self.loaded[1].describe_target(), settings.missing_latents)

    def _finish(self, stage: StageConfig, result: StageResult, trainer: StageTrainer) -> None:
        """Writes the stage's model, then the file that says so."""
        number = self.config.stages.index(stage)
        summary: dict[str, Any] = {
            "stage": stage.name,
            "steps": stage.steps,
            "metrics_bytes": result.metrics_bytes,
            "data": result.problems.state_dict(),
            "versions": versions(),
        }
        main, trained = self.processes.main, [(n, p) for n, p in trainer.model.named_parameters() if p.requires_grad]
        kept = {n: p.dtype for n, p in trained}
        values = gather(trained, main)
        averaged = None if trainer.average is None else gather(trainer.average.tensors.items(), main)

        def write() -> None:
            if averaged is not None:
                values_of = {name: tensor.to(kept[name]) for name, tensor in averaged.items()}
                self._write_model(self._average_folder(number), stage, values_of, summary)
            if stage.lora is not None:
                folder, lora = self.config.out / stage.name / ADAPTER, stage.lora
                write_folder(
                    folder, lambda at: save_adapter(at, values, lora, self.source), f"adapters of {stage.name}"
                )
            self._write_model(self._model_folder(number), stage, values, summary)
            write_json(self.config.out / stage.name / DONE, summary)
            if number and not self.config.settings.keep_stage_models:
                for folder in (self._model_folder(number - 1), self._average_folder(number - 1)):
                    shutil.rmtree(folder, ignore_errors=True)

        self.processes.on_main(write)

    def _write_model(
        self, folder: Path, stage: StageConfig, trained: dict[str, Tensor], summary: dict[str, Any]
    ) -> None:
        assert self.loaded is not None
        model, processor = self.loaded
        values = trained if stage.lora is None else merged(trained, stage.lora, self.source)

        def fill(at: Path) -> None:
            save_whole(at, model.config, values, self.source)
            processor.save_pretrained(at)
            write_json(at / "training.json", {**summary, "configuration": stage.describe()})

        write_folder(folder, fill, f"the model of {stage.name}")

    def _average_folder(self, number: int) -> Path:
        folder = self._model_folder(number)
        return folder.with_name(f"{folder.name}-ema")

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
