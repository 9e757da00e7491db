"""What the processes of a run do in tests: the three stages, and what may happen to one of them on the way."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from dreamllm.data import Pairs, Part, Reader, open_pairs
from dreamllm.training import RunConfig, StageConfig, run
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
