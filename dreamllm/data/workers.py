"""Processes that prepare data."""

from __future__ import annotations

import signal

import torch


def prepare_worker(worker: int) -> None:
    """Leaves interrupts to the parent, which ends its workers itself, and takes one thread: there is one per worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
