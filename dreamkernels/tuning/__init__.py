"""Measures launch parameters on this GPU and stores the best: `python -m dreamkernels tune`."""

from dreamkernels.tuning.search import Found, RejectedError, neighbours, search
from dreamkernels.tuning.tune import Outcome, tune
from dreamkernels.tuning.workloads import WORKLOADS, Workload, operators

__all__ = [
    "WORKLOADS",
    "Found",
    "Outcome",
    "RejectedError",
    "Workload",
    "neighbours",
    "operators",
    "search",
    "tune",
]
