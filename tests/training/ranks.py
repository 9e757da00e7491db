"""Several processes of one run, as torchrun starts them, without its seconds of start-up.

They are forked from a server process that has imported everything already and holds no threads.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

_PRELOADED = ["dreamllm.training", "tests.training.runs", "torch.distributed.fsdp", "torch.distributed.checkpoint"]
_TIMEOUT_SECONDS = 120


@dataclass
class Ended:
    """How a process ended: its exit code (negative: a signal), and what it printed and wrote to standard error."""

    code: int | None
    text: str


def start(world: int, function: Callable[..., Any], *args: Any, logs: Path) -> Callable[[], list[Ended]]:
    """Starts `function(*args)` in `world` processes; what is returned waits for them, by rank.

    `function` must be importable. An exception is printed with its traceback and gives exit code 1.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    logs.mkdir(parents=True, exist_ok=True)
    ranks = []
    for rank in range(world):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        process = context.Process(target=_rank, args=(environment, logs / f"{rank}.txt", function, args))
        process.start()
        ranks.append(process)

    def wait() -> list[Ended]:
        for process in ranks:
            process.join(_TIMEOUT_SECONDS)
        hanging = [process for process in ranks if process.is_alive()]
        for process in hanging:
            process.kill()
            process.join()
        ended = [Ended(p.exitcode, (logs / f"{rank}.txt").read_text()) for rank, p in enumerate(ranks)]
        del store_held[:]
        assert not hanging, "\n".join(f"rank {rank}: {end.text}" for rank, end in enumerate(ended))
        return ended

    store_held = [store]
    wait.processes = ranks  # type: ignore[attr-defined]
    return wait


def run_in(world: int, function: Callable[..., Any], *args: Any, logs: Path) -> list[Ended]:
    """`start`, then waits; every process must end well."""
    ended = start(world, function, *args, logs=logs)()
    assert all(end.code == 0 for end in ended), "\n".join(f"rank {r}: {end}" for r, end in enumerate(ended))
    return ended


def _rank(environment: dict[str, str], log: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    with open(log, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            try:
                function(*args)
            except Exception:
                traceback.print_exc()
                sys.exit(1)
