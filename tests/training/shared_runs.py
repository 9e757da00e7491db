"""What the processes of a run do in tests: the three stages, and what may happen to one of them on the way."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from rich.console import Console

from dreamllm.data import Pairs, Part, Reader, open_pairs
from dreamllm.model import DreamLLM
from dreamllm.monitoring import LogSettings, SampleSettings, watching
from dreamllm.training import EmaSettings, LoraSettings, RunConfig, StageConfig, run
from tests.training.runs import SETTINGS, Hooked

STEPS = 6
LANES = 4

Hook = Callable[[int], None]


def config(root: Path, out: Path, hook: Hook | None = None, tokens: int | None = None, **settings: Any) -> RunConfig:
    """Stages I, II and III of six steps of four micro-batches: of one document each, or of `tokens` tokens."""
    reader: Reader = Pairs(open_pairs(root / "data"), "both", seed=3)
    data = (Part(Hooked(reader, hook) if hook else reader),)
    common: dict[str, Any] = {"data": data, "steps": STEPS, "micro_batches": LANES, "condition_dropout": 0.2}
    common |= {"documents_per_step": LANES} if tokens is None else {"tokens_per_batch": tokens, "look_ahead": 4}
    stages = (
        StageConfig("one", "stage1", learning_rate=1e-2, **common),
        StageConfig("two", "stage2", learning_rate=1e-3, snr_gamma=5.0, weight_decay=0.1, **common),
        StageConfig("three", "stage3", learning_rate=1e-3, **common),
    )
    own = {"log_every": 1, "checkpoint_every": 2, **settings}
    return RunConfig(root / "start", stages, out, seed=11, settings=replace(SETTINGS, **own))


def train(root: Path, out: Path, settings: dict[str, Any], tokens: int | None = None) -> None:
    run(config(root, out, tokens=tokens, **settings), Console(width=200))


def watched(root: Path, out: Path, settings: dict[str, Any]) -> None:
    """Samples are taken from the model on the way."""
    samples = SampleSettings(every=3, draw=["a picture"], chat=["hello"], max_new_tokens=3)
    run(config(root, out, **settings), Console(width=200), watching(out, samples, LogSettings(), {}))


def adapted(root: Path, out: Path, settings: dict[str, Any], samples: bool = False) -> None:
    """Stages II and III train adapters of rank 2 in the place of the layers, and an average is kept."""
    made = config(root, out, ema=EmaSettings(0.5), **settings)
    lora = LoraSettings(rank=2, alpha=4.0, dropout=0.1, targets=("q_proj", "v_proj", "down_proj"))
    stages = tuple(replace(stage, lora=lora, learning_rate=1e-2) for stage in made.stages[1:])
    watch = watching(out, SampleSettings(every=3, chat=["hello"], max_new_tokens=3), LogSettings(), {})
    run(replace(made, stages=stages), Console(width=200), watch if samples else lambda main: ())


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def signalled(root: Path, out: Path, settings: dict[str, Any], rank: int, document: int, number: int) -> None:
    """One process gets a signal when it reads its `document`-th document."""

    def hook(count: int) -> None:
        if count == document and _rank() == rank:
            os.kill(os.getpid(), number)

    run(config(root, out, hook, **settings), Console(width=200))


def killed_once(root: Path, out: Path, settings: dict[str, Any], document: int) -> None:
    """The last process is killed when it reads its `document`-th document, but not after a restart."""
    world, attempt = int(os.environ["WORLD_SIZE"]), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    rank = world - 1 if attempt == 0 else -1
    signalled(root, out, settings, rank, document, signal.SIGKILL)


def failing(root: Path, out: Path, settings: dict[str, Any], rank: int, document: int) -> None:
    """One process raises when it reads its `document`-th document."""

    def hook(count: int) -> None:
        if count == document and _rank() == rank:
            raise ValueError(f"rank {rank} has had enough")

    run(config(root, out, hook, **settings), Console(width=200))


def without_room(root: Path, out: Path, settings: dict[str, Any], rank: int, document: int) -> None:
    """One process finds no room on the disk from its `document`-th document on."""

    def hook(count: int) -> None:
        if count == document and _rank() == rank:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

    run(config(root, out, hook, **settings), Console(width=200))


def killed_while_saving(root: Path, out: Path, settings: dict[str, Any], rank: int, save: int) -> None:
    """One process is killed while it writes its part of the `save`-th checkpoint."""
    write, count = dcp.FileSystemWriter.write_data, 0

    def write_and_die(self: Any, *args: Any) -> Any:
        nonlocal count
        count += 1
        if count == save and _rank() == rank:
            (Path(self.path) / f"__{rank}_0.distcp").write_bytes(b"begun")
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, *args)

    dcp.FileSystemWriter.write_data = write_and_die  # type: ignore[method-assign]
    train(root, out, settings)


def poisoned(root: Path, out: Path, settings: dict[str, Any], rank: int, passes: tuple[int, ...]) -> None:
    """In one process, the language loss of these forward passes, counted from 1, is not a number."""
    forward, count = DreamLLM.forward_packed, 0

    def forward_packed(self: DreamLLM, *args: Any, **options: Any) -> Any:
        nonlocal count
        output = forward(self, *args, **options)
        count += 1
        if count in passes and _rank() == rank:
            output.lm_loss = output.lm_loss * float("nan")
        return output

    DreamLLM.forward_packed = forward_packed  # type: ignore[method-assign]
    try:
        train(root, out, settings)
    finally:
        DreamLLM.forward_packed = forward  # type: ignore[method-assign]
