"""Which launch parameters to try next, and which to keep. Knows nothing of GPUs: costs come from a function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

Parameters = dict[str, int]

# (least, most) by parameter; all but programs and num_stages are powers of two. A block of keys, rows or columns may be
# an edge of a matrix product, and tensor cores take no edge below 16.
_RANGES = {
    "num_warps": (1, 16),
    "num_stages": (1, 5),
    "programs": (1, 4096),
    "group": (1, 64),
    "heads": (1, 64),
    "tokens": (1, 256),
    "heads_per_program": (1, 64),
    "rows_per_program": (1, 64),
    "groups_per_program": (1, 1024),
    "tiles_per_chunk": (1, 64),
    "block_channels": (1, 256),
    "block_q": (16, 256),
    "block_k": (16, 256),
    "block_keys": (16, 256),
    "float32_block_keys": (16, 256),
    "block_inner": (16, 256),
    "block_rows": (16, 512),
    "block_columns": (16, 16384),
    "block_positions": (16, 4096),
    "block_elements": (64, 16384),
}
FIXED = ("split_heads",)  # a matter of shape, not of speed alone
GAIN = 0.97  # a candidate must cost less than this share of the shipped parameters: less is noise


class RejectedError(Exception):
    """A candidate that the kernel does not allow, or that computes something else."""


@dataclass(frozen=True)
class Found:
    parameters: Parameters
    cost: float  # of the kept parameters, as a share of the shipped ones' cost; 1.0 when those are kept
    timed: int
    rejected: int


def neighbours(parameters: Parameters) -> Iterator[Parameters]:
    """One parameter halved or doubled (stages: one fewer or more), within what kernels allow.

    Raises ValueError for a parameter that nothing is known of.
    """
    for name, value in parameters.items():
        if name in FIXED:
            continue
        if name not in _RANGES:
            raise ValueError(f"launch parameter {name!r} has no range in dreamkernels/tuning/search.py; add one")
        least, most = _RANGES[name]
        steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        for step in steps:
            if least <= step <= most:
                yield {**parameters, name: step}


def search(shipped: Parameters, cost: Callable[[Parameters], float], rounds: int = 3) -> Found:
    """Walks from the shipped parameters to the cheapest neighbour, and on, for at most `rounds` steps.

    `cost` measures parameters and raises RejectedError for those that cannot be used. The winner is measured once more
    beside the shipped parameters and kept only if it is cheaper both times. Raises RejectedError when the shipped
    parameters are rejected.
    """
    costs: dict[tuple[tuple[str, int], ...], float] = {tuple(shipped.items()): cost(shipped)}
    rejected = 0
    best = dict(shipped)
    for _ in range(rounds):
        for candidate in neighbours(best):
            key = tuple(candidate.items())
            if key in costs:
                continue
            try:
                costs[key] = cost(candidate)
            except RejectedError:
                costs[key] = float("inf")
                rejected += 1
        cheapest = dict(min(costs.items(), key=lambda item: item[1])[0])
        if cheapest == best:
            break
        best = cheapest
    timed = len(costs) - rejected
    first = costs[tuple(best.items())] / costs[tuple(shipped.items())]
    if best != shipped and first < GAIN:
        again = cost(best) / cost(shipped)
        if again < GAIN:
            return Found(best, max(first, again), timed, rejected)
    return Found(dict(shipped), 1.0, timed, rejected)
