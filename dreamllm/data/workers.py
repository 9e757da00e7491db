"""Processes that prepare data."""

from __future__ import annotations

import signal
import sys

import torch

START_METHOD = "fork" if sys.platform == "linux" else None
"""How workers start; None: as Python prefers. Forked ones start at once, share what was read, and see their parent die.

A server that forks, which Python prefers from 3.14 on, and in its own children always, is the parent of them all: they
would import everything anew and outlive a process that was killed.
"""


def prepare_worker(worker: int) -> None:
    """Leaves interrupts to the parent, which ends its workers itself, and takes one thread: there is one per worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
