"""Two processes of one run, killed at random moments and started again, end with the bits of one left alone."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from tests.training import shared_runs
from tests.training.ranks import run_in, start
from tests.training.runs import metrics, weights

KILLS, AT_LEAST_WHILE_SAVING = 20, 4
SETTINGS = {"sharding": "full", "checkpoint_every": 1}


def train(root: Path, out: Path) -> None:
    shared_runs.train(root, out, SETTINGS)


def checkpoints(out: Path, partial: bool) -> set[Path]:
    return {path for path in out.glob("*/checkpoints/step-*") if (path.suffix == ".partial") == partial}


def wait_for_a_moment(out: Path, processes: Sequence[BaseProcess], chance: random.Random, seconds: float) -> None:
    """Returns some time after the start, some time after a checkpoint, or while one is being written."""
    kind = chance.choice(("start", "saved", "saving", "saving"))
    if kind == "start":
        processes[0].join(chance.uniform(0, 0.5) * seconds)
        return
    before = checkpoints(out, partial=kind == "saving")
    new = chance.randint(1, 2)
    while all(process.is_alive() for process in processes):
        if len(seen := checkpoints(out, partial=kind == "saving") - before) >= 1:
            new, before = new - 1, before | seen
            if not new:
                processes[0].join(chance.uniform(0, 0.01 if kind == "saving" else 0.2))
                return
        time.sleep(0.0005)


def kill(processes: Sequence[BaseProcess], chance: random.Random) -> bool:
    """Kills one process, and soon after the other, as torchrun does; whether there was one to kill."""
    victim, other = chance.sample(list(processes), 2)
    if victim.exitcode is not None or victim.pid is None:
        return False
    os.kill(victim.pid, signal.SIGKILL)
    other.join(chance.choice((0.0, 0.3)))
    other.kill()
    return True


def assert_same_bits(out: Path, reference: Path) -> None:
    assert metrics(out) == metrics(reference)
    for folder in ("one/model", "two/model", "model"):
        ours, theirs = weights(out / folder), weights(reference / folder)
        assert ours.keys() == theirs.keys()
        assert [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])] == []


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments_ends_with_the_same_bits(root, tmp_path):
    reference = tmp_path / "reference"
    before = time.monotonic()
    run_in(2, train, root, reference, logs=tmp_path / "logs")
    seconds = time.monotonic() - before
    chance = random.Random(7)
    killed = while_saving = attempts = 0
    while killed < KILLS:
        out = tmp_path / f"out{attempts}"
        done = False
        while not done:
            attempts += 1
            assert attempts < 3 * KILLS, "the runs do not get on"
            wait = start(2, train, root, out, logs=tmp_path / f"logs{attempts}")
            if killed < KILLS:
                wait_for_a_moment(out, wait.processes, chance, seconds)
                if kill(wait.processes, chance):
                    killed += 1
                    while_saving += bool(checkpoints(out, partial=True))
            ended = wait()
            assert all(end.code in (0, -signal.SIGKILL) or "ProcessLostError" in end.text for end in ended), ended
            done = all(end.code == 0 for end in ended)
        assert_same_bits(out, reference)
    assert while_saving >= AT_LEAST_WHILE_SAVING
