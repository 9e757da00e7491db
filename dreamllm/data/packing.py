"""Packs: which of the documents at hand fill a batch of a fixed number of tokens best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Held:
    """A document that waits for a batch: its position in the mixture's order, tokens, and pictures to create."""

    position: int
    tokens: int
    pictures: int


def choose(held: Sequence[Held], tokens: int, pictures: int | None = None) -> list[int]:
    """Indices of those of `held` that fill `tokens` best, with at most `pictures` pictures to create; ascending.

    The first, the oldest, is always among them, so that none waits forever: a document goes out after at most as many
    batches as there are documents before it. Of all choices that fill equally, the one that leaves the newest
    documents out. Raises `ValueError` when there is none or the first does not fit on its own.

    This is the subset-sum problem, solved exactly: bit t of `sums[p]` says that t tokens with p pictures can be had.
    """
    if not held:
        raise ValueError("there are no documents to choose from")
    first, most = held[0], sum(item.pictures for item in held)
    limit = most if pictures is None else min(pictures, most)
    if first.tokens > tokens or first.pictures > limit:
        raise ValueError(
            f"a document of {first.tokens} tokens and {first.pictures} pictures does not fit into {tokens} tokens"
            + ("" if pictures is None else f" and {pictures} pictures")
        )
    return _chosen(held, tokens, limit if pictures is not None else None)


def _chosen(held: Sequence[Held], tokens: int, pictures: int | None) -> list[int]:
    # Without a limit on pictures one row of sums will do.
    first = held[0]
    costs = [0 if pictures is None else item.pictures for item in held]
    within = (1 << (tokens + 1)) - 1
    rows = 1 if pictures is None else pictures + 1
    sums = [0] * rows
    sums[costs[0]] = 1 << first.tokens
    history = [sums]
    for item, cost in zip(held[1:], costs[1:], strict=True):
        before = sums
        sums = list(before)
        for row in range(cost, rows):
            sums[row] |= (before[row - cost] << item.tokens) & within
        history.append(sums)
        if any(row >> tokens & 1 for row in sums):
            break  # full: newer documents need not be looked at
    total = max(row.bit_length() for row in sums) - 1
    row = next(r for r, values in enumerate(sums) if values >> total & 1)
    return _retraced(held, costs, history, total, row)


def _retraced(held: Sequence[Held], costs: Sequence[int], history: list[list[int]], total: int, row: int) -> list[int]:
    chosen = []
    for i in range(len(history) - 1, 0, -1):
        if history[i - 1][row] >> total & 1:
            continue  # can be had without this one
        chosen.append(i)
        total -= held[i].tokens
        row -= costs[i]
    return [0, *reversed(chosen)]
