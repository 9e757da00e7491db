"""`python -m benchmarks.training_overhead`: what the trainer costs beyond its steps.

The bare loop takes batches from the loader and runs `train_step` on them. The trainer does the same with counting,
generators, progress, metrics, operations, and the reading back of losses. Both train the same model on the same
documents in one process, in turn. What a step costs is the time between the ends of two steps that follow each other;
what comes before and after (making the optimiser, the first plans, writing) is paid once per run and shown apart.
"""

from __future__ import annotations

import argparse
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dreamllm.data import LoaderState, load_steps
from dreamllm.model import DreamLLM, DreamLLMProcessor
from dreamllm.training import RunConfig, RunSettings, StageConfig, processes
from dreamllm.training.interrupt import InterruptRequest
from dreamllm.training.stage import StageTrainer, stage_batches
from dreamllm.training.step import make_optimizer, prepare_model, train_step
from dreamllm.workloads import SIZES, STAGES, make_model, make_processor, stage_config


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
    done: list[float]
    ended: float = 0.0

    @property
    def per_step(self) -> list[float]:
        """Of every step but the first."""
        return [after - before for before, after in itertools.pairwise(self.done)]

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


def measure(stage: StageConfig, size: str, rounds: int) -> dict[str, list[Run]]:
    """The runs of each program; prints what their steps cost, and what is paid once."""
    model, processor = make_model(size), make_processor(size)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def bare(run: Run) -> None:
        optimizer = make_optimizer(prepare_model(model, stage), stage)
        loaded = load_steps(stage_batches(stage, processor), range(1), 1, LoaderState.initial(1), steps=stage.steps)
        for number, (lane,) in enumerate(loaded):
            train_step(model, optimizer, [lane.batch], stage, torch.Generator().manual_seed(number))
            run.done.append(time.perf_counter())

    def trainer(run: Run, checkpoint_every: int, terminal: bool = False) -> None:
        with tempfile.TemporaryDirectory() as folder, processes("cpu") as these, InterruptRequest() as interrupt:
            settings = RunSettings(checkpoint_every=checkpoint_every, keep_checkpoints=1, device="cpu", log_every=1)
            config = RunConfig(Path(folder) / "start", (stage,), Path(folder), settings=settings)
            (Path(folder) / stage.name).mkdir()
            console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
            watching = (Clock(run),)
            made = StageTrainer(config, stage, model, processor, 0, console, these, watching, peak=1e12, counted=True)
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
            run = Run(time.perf_counter(), [])
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
        "ms per step, median",
        "beyond the bare loop",
        "in pairs: median, half of them",
        "ms once",
    ):
        table.add_column(column)
    bare = runs["bare loop"]
    base = statistics.median(seconds for run in bare for seconds in run.per_step)
    for name, own in runs.items():
        middle = statistics.median(seconds for run in own for seconds in run.per_step)
        # The same step on the same documents, of the same round.
        pairs = sorted(
            mine / other - 1
            for run, reference in zip(own, bare, strict=True)
            for mine, other in zip(run.per_step, reference.per_step, strict=True)
        )
        low, half, high = statistics.quantiles(pairs, n=4) if len(pairs) > 1 else (pairs[0],) * 3
        once = statistics.median(run.once for run in own)
        spread = f"{half:+.2%} ({low:+.1%} to {high:+.1%})"
        table.add_row(name, f"{middle * 1e3:.1f}", f"{middle / base - 1:+.2%}", spread, f"{once * 1e3:.0f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
