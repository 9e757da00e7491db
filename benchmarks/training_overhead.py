"""`python -m benchmarks.training_overhead`: what the trainer costs beyond its steps.

The bare loop takes batches from the loader and runs `train_step` on them. The trainer does the same with counting,
generators, progress, metrics, and the reading back of losses. Both train the same model on the same documents in one
process, in turn; the shares are of medians.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from dreamllm.data import LoaderState, load_steps
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


def measure(stage: StageConfig, size: str, rounds: int) -> dict[str, list[float]]:
    """Seconds per step of each program in each round; prints their medians."""
    model, processor = make_model(size), make_processor(size)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def bare() -> None:
        optimizer = make_optimizer(prepare_model(model, stage), stage)
        loaded = load_steps(stage_batches(stage, processor), range(1), 1, LoaderState.initial(1), steps=stage.steps)
        for number, (lane,) in enumerate(loaded):
            train_step(model, optimizer, [lane.batch.to("cpu")], stage, torch.Generator().manual_seed(number))

    def trainer(checkpoint_every: int) -> None:
        with tempfile.TemporaryDirectory() as folder, processes("cpu") as these, InterruptRequest() as interrupt:
            settings = RunSettings(checkpoint_every=checkpoint_every, keep_checkpoints=1, device="cpu")
            config = RunConfig(Path(folder) / "start", (stage,), Path(folder), settings=settings)
            (Path(folder) / stage.name).mkdir()
            console = Console(file=io.StringIO())
            StageTrainer(config, stage, model, processor, 0, console, these).run(interrupt)

    programs: dict[str, Callable[[], None]] = {
        "bare loop": bare,
        "trainer": lambda: trainer(stage.steps),
        f"trainer, a checkpoint every {max(1, stage.steps // 2)} steps": lambda: trainer(max(1, stage.steps // 2)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(rounds + 1):
        for name, program in programs.items():
            model.load_state_dict(start)
            began = time.perf_counter()
            program()
            if number:  # the first round warms up
                seconds[name].append((time.perf_counter() - began) / stage.steps)
    report(stage, size, seconds)
    return seconds


def report(stage: StageConfig, size: str, seconds: dict[str, list[float]]) -> None:
    table = Table(title=f"{stage.name}, {size}: {stage.steps} steps of {stage.documents_per_step} documents")
    for column in ("program", "ms per step, median", "best", "beyond the bare loop"):
        table.add_column(column)
    base = statistics.median(seconds["bare loop"])
    for name, values in seconds.items():
        middle = statistics.median(values)
        table.add_row(name, f"{middle * 1e3:.1f}", f"{min(values) * 1e3:.1f}", f"{middle / base - 1:+.2%}")
    Console().print(table)


if __name__ == "__main__":
    main()
