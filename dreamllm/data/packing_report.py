"""How full packs are, beside batches of as many documents that are padded to their longest."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from dreamllm.data.loader import Batches
from dreamllm.data.packing import Held

FILLED_ENOUGH = 0.97


@dataclass(frozen=True)
class PackingReport:
    """What `batches` packs of `tokens_per_batch` tokens hold.

    - `fill`: share of the tokens that documents fill; `least_fill`: of the emptiest pack.
    - `documents`, `pictures`: per pack on average; `most_pictures`: of one pack.
    - `padded_fill`: share of a grid that documents fill when `padded_documents` of them, as many as a pack holds on
      average, are padded to the longest, in the order in which they are drawn.
    - `longest_wait`: the most packs of its lane that a document was held back for.
    """

    tokens_per_batch: int
    batches: int
    fill: float
    least_fill: float
    documents: float
    pictures: float
    most_pictures: int
    padded_fill: float
    padded_documents: int
    longest_wait: int

    def __str__(self) -> str:
        return (
            f"{self.batches} packs of {self.tokens_per_batch} tokens: {self.fill:.1%} full (the emptiest "
            f"{self.least_fill:.1%}), {self.documents:.1f} documents and {self.pictures:.1f} pictures to create each "
            f"(at most {self.most_pictures}); held back for at most {self.longest_wait} packs\n"
            f"{self.padded_documents} documents padded to the longest: {self.padded_fill:.1%} full"
        )


def measure_packing(batches: Batches, count: int = 100) -> PackingReport:
    """Plans `count` packs of one lane; no picture is decoded. Raises `ValueError` for batches of whole documents."""
    if batches.settings.tokens_per_batch is None:
        raise ValueError("batches of a fixed number of documents are not packed to a number of tokens")
    if count < 1:
        raise ValueError(f"at least one pack must be planned, not {count}")
    plans = list(itertools.islice(batches.plans(0, 1), count))
    waiting = plans[-1].state.position
    assert waiting is not None
    drawn = [batches.samples.measure(position) for position in range(waiting)]
    packs = [[drawn[position] for position in plan.positions] for plan in plans]
    tokens = [sum(item.tokens for item in pack) + batches.settings.tokens_per_batch - batches.room for pack in packs]
    pictures = [sum(item.pictures for item in pack) for pack in packs]
    together = max(1, round(sum(map(len, packs)) / count))
    return PackingReport(
        tokens_per_batch=batches.settings.tokens_per_batch,
        batches=count,
        fill=sum(tokens) / count / batches.settings.tokens_per_batch,
        least_fill=min(tokens) / batches.settings.tokens_per_batch,
        documents=sum(map(len, packs)) / count,
        pictures=sum(pictures) / count,
        most_pictures=max(pictures),
        padded_fill=_padded_fill(drawn, together),
        padded_documents=together,
        longest_wait=_longest_wait([plan.state.held for plan in plans]),
    )


def _padded_fill(drawn: list[Held], together: int) -> float:
    lengths = [item.tokens for item in drawn]
    groups = [lengths[i : i + together] for i in range(0, len(lengths) - together + 1, together)]
    return sum(map(sum, groups)) / sum(together * max(group) for group in groups)


def _longest_wait(held: list[tuple[int, ...]]) -> int:
    waits: dict[int, int] = {}
    for positions in held:
        for position in positions:
            waits[position] = waits.get(position, 0) + 1
    return max(waits.values(), default=0)
