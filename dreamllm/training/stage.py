"""The loop of one stage: batches by number, steps, metrics, checkpoints, and a defined end whatever happens."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dreamllm.data import (
    Batches,
    BatchPlan,
    LatentCache,
    LoadedBatch,
    LoaderSettings,
    LoaderState,
    Mixture,
    ProblemLog,
    derive_seed,
    load_steps,
)
from dreamllm.model import DreamLLM, DreamLLMProcessor
from dreamllm.training.averaging import Average
from dreamllm.training.bad_batch import store_batches
from dreamllm.training.checkpoints import StageCheckpoints
from dreamllm.training.configuration import RunConfig, StageConfig, learning_rate
from dreamllm.training.distributed import PendingSum, Processes
from dreamllm.training.errors import NonFiniteLossError, SaveError, TrainingInterrupted
from dreamllm.training.interrupt import InterruptRequest
from dreamllm.training.lora import add_adapters
from dreamllm.training.metrics import (
    MetricsFile,
    Readback,
    StepCounts,
    StepRecord,
    StepTimes,
    interval_line,
    peak_memory,
    record_from_json,
    record_to_json,
)
from dreamllm.training.observers import RunObserver
from dreamllm.training.operations import StepOperations
from dreamllm.training.progress import StageProgress, describe_line, say
from dreamllm.training.sharding import ShardedModel, shards
from dreamllm.training.step import Pass, count, make_optimizer, prepare_model, run_step, unreached


@dataclass
class StageResult:
    """Where the metrics file stood when the stage was complete, and what was wrong with its data."""

    metrics_bytes: int
    problems: ProblemLog


@dataclass
class _Step:
    """The lanes of this process, what all lanes hold together, and in how many processes a stop was requested."""

    lanes: list[LoadedBatch]
    sums: PendingSum

    @property
    def counts(self) -> StepCounts:
        return StepCounts(*self.sums.result()[:-1])

    @property
    def stops(self) -> bool:
        return self.sums.result()[-1] > 0


def stage_batches(
    stage: StageConfig,
    processor: DreamLLMProcessor,
    seed: int = 0,
    max_consecutive_bad: int = 20,
    latents: LatentCache | None = None,
) -> Batches:
    """The batches of `stage` in a run with `seed`."""
    mixture = Mixture(stage.data, derive_seed(seed, stage.name, "data"))
    fixed = stage.documents_per_step
    loader = LoaderSettings(
        documents_per_batch=None if fixed is None else fixed // stage.micro_batches,
        tokens_per_batch=stage.tokens_per_batch,
        look_ahead=stage.look_ahead,
        pictures_per_batch=stage.pictures_per_batch,
        with_null=stage.condition_dropout > 0,
        flip_targets=stage.flip_targets,
        max_consecutive_bad=max_consecutive_bad,
    )
    return Batches(mixture, processor, loader, latents)


class StageTrainer:
    """Trains `model` in place through one stage of `config`. `metrics_bytes`: size of the metrics before the stage.
    `source`: folder of what `model` lacks, see `ShardedModel`. `peak`: operations per second of all devices together;
    `counted`: operations are counted, whether or not their peak is known.

    With several processes, or with sharding, `model` is sharded for this stage and cannot be used for another.
    """

    def __init__(
        self,
        config: RunConfig,
        stage: StageConfig,
        model: DreamLLM,
        processor: DreamLLMProcessor,
        metrics_bytes: int,
        console: Console,
        processes: Processes,
        observers: Sequence[RunObserver] = (),
        latents: LatentCache | None = None,
        source: Path | None = None,
        peak: float | None = None,
        counted: bool = False,
    ) -> None:
        self.config, self.stage, self.model, self.console = config, stage, model, console
        self.settings, self.processes = config.settings, processes
        self.folder = config.out / stage.name
        self.device = processes.device
        self.lanes = processes.lanes(stage.micro_batches)
        self.processor, self.observers = processor, tuple(observers)
        self.batches = stage_batches(stage, processor, config.seed, self.settings.max_consecutive_bad, latents)
        sharded = shards(self.settings, processes)
        if not sharded:
            model.to(self.device)  # a sharded one goes there layer by layer
        seed = derive_seed(config.seed, stage.name, "lora")
        if stage.lora is not None:
            add_adapters(model, stage.lora, seed)
        prepare_model(model, stage)
        self.operations, self.peak = StepOperations(model, stage.weights[0]) if counted else None, peak
        model.use_less_memory(self.settings.recompute_layers, self.settings.pictures_per_pass)
        if sharded:
            self.through: Pass = ShardedModel(model, stage, self.settings, processes, source, seed)
        else:
            self.through = Pass(model, stage, self._autocast())
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(list(trained.values()), stage)
        self.average = None if self.settings.ema is None else Average(trained, self.settings.ema)
        self.checkpoints = StageCheckpoints(
            self.folder,
            self.settings.keep_checkpoints,
            lambda text: say(console, text),
            processes,
            self.settings.keep_every,
            self.settings.save_in_background,
        )
        self.metrics = MetricsFile(config.out / "metrics.jsonl")
        self.problems = ProblemLog(self.settings.max_bad_fraction)
        self.readback = Readback()
        self.interval: list[StepRecord] = []
        self.loader = LoaderState.initial(stage.micro_batches)
        self.plans: dict[int, list[BatchPlan]] = {}
        self.elapsed = self.line_elapsed = 0.0
        self.done = self.skipped = 0
        self.metrics_bytes = metrics_bytes

    def run(self, interrupt: InterruptRequest) -> StageResult:
        """Goes on from the newest checkpoint, or begins, and returns when all steps are done.

        Raises `TrainingInterrupted` after saving when `interrupt` was requested, `NonFiniteLossError` after storing the
        batch, `SaveError`, and `TooManyBadSamplesError`.
        """
        try:
            return self._run(interrupt)
        finally:
            self.checkpoints.close()

    def _run(self, interrupt: InterruptRequest) -> StageResult:
        self._resume()
        self.clock = time.monotonic() - self.elapsed
        with StageProgress(self.console, self.stage.name, self.stage.steps, self.done) as progress:
            for step, waited in _timed(self._steps(interrupt)):
                self._step(step, waited)
                progress.advance()
                self._log(progress)
                self.checkpoints.check()
                self._show()
                if self.done == self.stage.steps:
                    break
                if step.stops if self.processes.world > 1 else interrupt.requested:
                    self._stop(progress)
                if self.done % self.settings.checkpoint_every == 0:
                    self._save(progress)
            self._log(progress, everything=True)
        self.checkpoints.wait()
        problems = self._all_problems()
        if problems.counts:
            say(self.console, f"{self.stage.name}: {problems.bad} samples were left out\n{problems.summary()}")
        return StageResult(self.metrics.sync(), problems)

    def _show(self) -> None:
        """Lets the observers see the model."""
        needed = any(observer.needs_model(self.done) for observer in self.observers)
        with self.through.whole() if needed else contextlib.nullcontext():
            for observer in self.observers:
                observer.after_step(self.stage.name, self.done, self.model, self.processor)

    # -- steps ---------------------------------------------------------------------------------------------------------

    def _steps(self, interrupt: InterruptRequest) -> Iterator[_Step]:
        loaded = load_steps(
            self.batches,
            self.lanes,
            self.stage.micro_batches,
            self.loader,
            self.settings.workers,
            pin_memory=self.device.type == "cuda",
            steps=self.stage.steps - self.done,
        )
        waiting: _Step | None = None
        with contextlib.closing(loaded):
            for lanes in loaded:
                held = count([lane.batch for lane in lanes])
                bad = sum(not (problem.kept or problem.filtered) for lane in lanes for problem in lane.problems)
                targets = held.targets if self.stage.weights[0] else 0  # else the language loss is not computed
                operations = sum(self.operations.of(lane.batch) for lane in lanes) if self.operations else 0
                counts = (held.tokens, targets, held.pictures, held.documents, bad, operations)
                step = _Step(lanes, self.processes.sum((*counts, interrupt.requested)))
                if self.processes.world == 1:
                    yield step
                    continue
                # The sum travels while the step before runs.
                if waiting is not None:
                    yield waiting
                waiting = step
            if waiting is not None:
                yield waiting

    def _step(self, step: _Step, waited: float) -> None:
        counts = step.counts
        rate = learning_rate(self.stage, self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batches, generators = [], []
        for lane in step.lanes:
            self.problems.add(lane.batch.num_documents, lane.problems)
            seed = derive_seed(self.config.seed, self.stage.name, "step", self.done, lane.lane)
            generators.append(torch.Generator(self.device).manual_seed(seed))
            batches.append(lane.batch.to(self.device, non_blocking=True))
        skip = self.settings.on_nonfinite == "skip"
        losses = run_step(self.through, self.optimizer, batches, generators, counts, skip)
        self.done += 1
        if self.average is not None:
            self.average.update(self.done)
        plans = [lane.plan for lane in step.lanes]
        self.loader, self.plans[self.done] = self.loader.after(plans), plans
        self.elapsed = time.monotonic() - self.clock
        self.readback.add(StepTimes(self.done, self.elapsed, waited, rate), counts, losses)

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.settings.precision != "bfloat16":
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
            self._check(record)
            del self.plans[record.step]
            self.interval.append(record)
            if record.step % self.settings.log_every == 0 or record.step == self.stage.steps:
                self._write_line(progress)

    def _write_line(self, progress: StageProgress) -> None:
        line = interval_line(self.stage.name, self.interval, self.line_elapsed, peak_memory(self.device), self.peak)
        if self.processes.main:
            self.metrics.append(line)
            for observer in self.observers:
                observer.line(line)
        progress.show(line["step"], describe_line(line))
        self.line_elapsed = self.interval[-1].times.elapsed
        self.interval = []

    def _check(self, record: StepRecord) -> None:
        """Raises when a step trained nothing, or when its loss is not finite and that is not to be skipped."""
        if record.finite:
            self.skipped = 0
            if record.grad_norm == 0 and not self.through.keeps_gradients:
                raise ValueError(unreached(self.stage, [f"step {record.step}"]))
            return
        self.skipped += 1
        values = (
            f"language {record.lm_loss:g}, diffusion {record.vm_loss:g}, total {record.loss:g}, "
            f"gradient norm {record.grad_norm:g}"
        )
        where = f"stage {self.stage.name}, step {record.step}: the loss is not finite ({values})"
        if self.settings.on_nonfinite == "skip" and self.skipped < self.settings.max_consecutive_skips:
            say(self.console, f"{where}; its update was skipped")
            return
        plans = [plan for own in self.processes.gather(self.plans[record.step]) for plan in own]
        self.processes.on_main(lambda: self._refuse(record, where, plans))

    def _refuse(self, record: StepRecord, where: str, plans: list[BatchPlan]) -> None:
        """Stores the batches of `plans`, made once more, and raises."""
        batches = [self.batches.load(plan).batch for plan in plans]
        path = self.folder / f"bad_batch_step_{record.step:06d}.pt"
        about = {**record_to_json(record), "stage": self.stage.name, "step": record.step}
        documents = store_batches(path, where, about, batches)
        raise NonFiniteLossError(
            f"{where}. Its {documents} are stored in {path}. Look at them, or lower "
            f"learning_rate ({self.stage.learning_rate:g}), and train into a new folder"
        )

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        state = self.checkpoints.restore(self.model, self.optimizer, self._averaged())
        if state is not None:
            self.done = state["step"]
            self.metrics_bytes = state["metrics_bytes"]
            if self.processes.main:
                self.problems.load_state_dict(state["problems"])
            self.interval = [record_from_json(values) for values in state["interval"]]
            self.elapsed, self.line_elapsed = state["elapsed"], state["line_elapsed"]
            self.skipped = state["skipped"]
            self.loader = LoaderState.from_json(state["loader"])
        self.loader = self.loader.of(self.lanes)
        if self.processes.main:
            self.metrics.cut(self.metrics_bytes)

    def _save(self, progress: StageProgress) -> None:
        self._log(progress, everything=True)  # so that no checkpoint holds a step whose loss was not finite
        state: dict[str, Any] = {
            "metrics_bytes": self.metrics.sync(),
            "problems": self._all_problems().state_dict(),
            "interval": [record_to_json(record) for record in self.interval],
            "elapsed": self.elapsed,
            "line_elapsed": self.line_elapsed,
            "skipped": self.skipped,
            "loader": LoaderState.merge(self.processes.gather(self.loader)).to_json(),
        }
        self.checkpoints.save(self.done, self.model, self.optimizer, state, self._averaged())

    def _averaged(self) -> dict[str, torch.Tensor] | None:
        return None if self.average is None else self.average.tensors

    def _all_problems(self) -> ProblemLog:
        """Those of all processes."""
        return ProblemLog.merge(self.processes.gather(self.problems))

    def _stop(self, progress: StageProgress) -> None:
        try:
            self._save(progress)
            self.checkpoints.wait()
        except SaveError as error:
            say(self.console, str(error))
        else:
            where = f"saved in {self.checkpoints.path(self.done)}"
            say(self.console, f"\nstopped after step {self.done} of {self.stage.name}, {where}")
        say(self.console, "rerun the same command to resume")
        raise TrainingInterrupted


def _timed(steps: Iterator[_Step]) -> Iterator[tuple[_Step, float]]:
    """Each step with the seconds for which it was waited."""
    while True:
        began = time.monotonic()
        step = next(steps, None)
        if step is None:
            return
        yield step, time.monotonic() - began
