"""`python -m benchmarks.training_overhead`: what the trainer costs beyond its steps.

The bare loop takes batches from the loader and runs `train_step` on them. The trainer does the same with counting,
generators, progress, metrics, operations, and the reading back of losses. Both train the same model on the same
documents in one process, in turn. Three figures of each: the time from the end of a step to the end of the next, each
step's least of all rounds, because whatever disturbs a step only adds to it; of it, what was spent neither in the step
nor in waiting for its batch, which other work on the machine hardly touches; and what is paid once per run (making the
optimiser, the first plans, writing).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from dreamllm.data import LoaderState, load_steps
from dreamllm.model import DreamLLM, DreamLLMProcessor
from dreamllm.training import RunConfig, RunSettings, StageConfig, processes
from dreamllm.training import stage as trainer_module
from dreamllm.training.interrupt import InterruptRequest
from dreamllm.training.stage import StageTrainer, stage_batches
from dreamllm.training.step import make_optimizer, prepare_model, train_step
from dreamllm.workloads import SIZES, STAGES, make_model, make_processor, stage_config

T = TypeVar("T")
SEED = 0
"""Of both, or they would train on other documents."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_overhead", description=__doc__)
    parser.add_argument("--stage", choices=list(STAGES), default="stage2")
    parser.add_argument("--size", choices=list(SIZES), default="mini")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    measure(stage_config(arguments.stage, arguments.size, steps=arguments.steps), arguments.size, arguments.rounds)


@dataclass
class Run:
    """When each step of a run was done, and when the run began and ended, in seconds."""

    began: float
    done: list[float] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)
    ended: float = 0.0

    def timed(self, work: Callable[[], T]) -> T:
        """Runs `work`, a step or the making of its batch; its time is part of the step's own."""
        began = time.perf_counter()
        try:
            return work()
        finally:
            self.inside.append(time.perf_counter() - began)

    @property
    def per_step(self) -> list[float]:
        """Of every step but the first."""
        return [after - before for before, after in itertools.pairwise(self.done)]

    @property
    def beside(self) -> list[float]:
        """Of every step but the first: without the step itself and its batch, one after the other in `inside`."""
        own = [self.inside[i] + self.inside[i + 1] for i in range(2, 2 * len(self.done), 2)]
        return [whole - part for whole, part in zip(self.per_step, own, strict=True)]

    @property
    def once(self) -> float:
        """What the run took beyond its steps, the first one taken as long as the others."""
        return self.ended - self.began - len(self.done) * statistics.median(self.per_step)


class Clock:
    """A `RunObserver` that notes when each step is done."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def needs_model(self, step: int) -> bool:
        return False

    def line(self, line: dict[str, Any]) -> None:
        """Not its concern."""

    def after_step(self, stage: str, step: int, model: DreamLLM, processor: DreamLLMProcessor) -> None:
        self.run.done.append(time.perf_counter())

    def close(self) -> None:
        """Nothing is kept open."""


@contextlib.contextmanager
def timing(run: Run) -> Iterator[None]:
    """Inside, the trainer's steps and its waiting for batches are noted in `run`."""
    step, load = trainer_module.run_step, trainer_module.load_steps

    def timed_step(*args: Any) -> Any:
        return run.timed(lambda: step(*args))

    def timed_load(*args: Any, **options: Any) -> Iterator[Any]:
        loaded = load(*args, **options)
        with contextlib.closing(loaded):
            for _ in range(options["steps"]):
                yield run.timed(lambda: next(loaded))

    trainer_module.run_step, trainer_module.load_steps = timed_step, timed_load  # type: ignore[assignment]
    try:
        yield
    finally:
        trainer_module.run_step, trainer_module.load_steps = step, load


def measure(stage: StageConfig, size: str, rounds: int) -> dict[str, list[Run]]:
    """The runs of each program; prints what their steps cost, and what is paid once."""
    model, processor = make_model(size), make_processor(size)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def bare(run: Run) -> None:
        optimizer = make_optimizer(prepare_model(model, stage), stage)
        batches = stage_batches(stage, processor, SEED)
        loaded = load_steps(batches, range(1), 1, LoaderState.initial(1), steps=stage.steps)
        for number in range(stage.steps):
            (lane,) = run.timed(lambda: next(loaded))
            generator = torch.Generator().manual_seed(number)
            batch = lane.batch.to("cpu")
            run.timed(lambda batch=batch, by=generator: train_step(model, optimizer, [batch], stage, by))
            run.done.append(time.perf_counter())

    def trainer(run: Run, checkpoint_every: int, terminal: bool = False) -> None:
        with tempfile.TemporaryDirectory() as folder, processes("cpu") as these, InterruptRequest() as interrupt:
            settings = RunSettings(checkpoint_every=checkpoint_every, keep_checkpoints=1, device="cpu", log_every=1)
            config = RunConfig(Path(folder) / "start", (stage,), Path(folder), seed=SEED, settings=settings)
            (Path(folder) / stage.name).mkdir()
            console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
            watching = (Clock(run),)
            made = StageTrainer(config, stage, model, processor, 0, console, these, watching, peak=1e12, counted=True)
            with timing(run):
                made.run(interrupt)

    programs: dict[str, Callable[[Run], None]] = {
        "bare loop": bare,
        "trainer": lambda run: trainer(run, stage.steps),
        "trainer on a terminal": lambda run: trainer(run, stage.steps, terminal=True),
        f"trainer, a checkpoint every {max(1, stage.steps // 2)} steps": lambda run: trainer(
            run, max(1, stage.steps // 2)
        ),
    }
    model.use_less_memory(RunSettings().recompute_layers)  # as the trainer does
    runs: dict[str, list[Run]] = {name: [] for name in programs}
    for number in range(rounds + 1):
        for name, program in programs.items():
            model.load_state_dict(start)
            run = Run(time.perf_counter())
            program(run)
            run.ended = time.perf_counter()
            if number:  # the first round warms up
                runs[name].append(run)
    report(stage, size, runs)
    return runs


def report(stage: StageConfig, size: str, runs: dict[str, list[Run]]) -> None:
    table = Table(title=f"{stage.name}, {size}: {stage.steps} steps of {stage.documents_per_step} documents")
    for column in (
        "program",
        "ms per step",
        "beyond the bare loop",
        "ms beside the step",
        "beyond the bare loop",
        "ms once",
    ):
        table.add_column(column, justify="left" if column == "program" else "right")
    figures = {name: _figures(own) for name, own in runs.items()}
    whole, beside, _ = figures["bare loop"]
    for name, (step, own, once) in figures.items():
        more = f"{(own - beside) / whole:+.2%}"
        table.add_row(name, f"{step:.1f}", f"{step / whole - 1:+.2%}", f"{own:.2f}", more, f"{once:.0f}")
    Console(width=130).print(table)


def _figures(runs: list[Run]) -> tuple[float, float, float]:
    """In milliseconds: a step, the mean of each step's least; the medians of what was beside steps and paid once."""
    step = statistics.mean(map(min, zip(*(run.per_step for run in runs), strict=True)))
    beside = statistics.median(seconds for run in runs for seconds in run.beside)
    once = statistics.median(run.once for run in runs)
    return 1e3 * step, 1e3 * beside, 1e3 * once


if __name__ == "__main__":
    main()
