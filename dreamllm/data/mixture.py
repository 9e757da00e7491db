"""Readers mixed in given proportions, in an order that is a function of the seed alone."""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dreamllm.data.reader import Reader
from dreamllm.data.seeds import Permutation, derive_seed
from dreamllm.documents import Document

_UNITS = {"": 1, "K": 1_000, "M": 1_000_000, "B": 1_000_000_000}


@dataclass(frozen=True)
class Part:
    """One reader of a mixture.

    `size`: its virtual size, samples per epoch of the mixture, e.g. 558000 or "558K" or "20M". `weight`: its share
    instead. With neither, its real length.
    """

    reader: Reader
    size: int | str | None = None
    weight: float | None = None

    def describe(self) -> dict[str, Any]:
        return {**self.reader.describe(), "size": self.size, "weight": self.weight}


@dataclass(frozen=True)
class Draw:
    """Which document stands at a position of the order: of which reader, and how often that one was gone through."""

    reader: Reader
    index: int
    epoch: int

    def document(self) -> Document:
        return self.reader.document(self.index, self.epoch)

    def outline(self) -> Document:
        """The document with pictures of no content: see `Reader.outline`."""
        return self.reader.outline(self.index, self.epoch)

    def following(self) -> Draw:
        """The next document of the same reader: what replaces a sample that cannot be used."""
        index = self.index + 1
        return Draw(self.reader, index % len(self.reader), self.epoch + index // len(self.reader))


class Mixture:
    """An endless order of documents. `mixture.draw(position)` is a pure function of (parts, seed, position).

    One epoch holds as many samples as the virtual sizes add up to, each reader `size` times, shuffled anew. A reader
    longer than its size goes on in the next epoch where it stopped, so that all of it is seen; a shorter one repeats.

    Raises `ValueError` for an empty mixture or reader, a size or weight that is not positive, and a mixture in which
    some parts have weights and others do not.
    """

    def __init__(self, parts: Sequence[Part], seed: int) -> None:
        if not parts:
            raise ValueError("a mixture needs at least one reader")
        for part in parts:
            if not len(part.reader):
                raise ValueError(f"reader {part.reader.name} is empty")
        self.parts, self.seed = tuple(parts), seed
        self.sizes = _virtual_sizes(self.parts)
        self._ends = [sum(self.sizes[: i + 1]) for i in range(len(self.sizes))]
        self._permutation: tuple[int, Permutation] | None = None

    def __len__(self) -> int:
        """Samples per epoch."""
        return self._ends[-1]

    def draw(self, position: int) -> Draw:
        """What stands at `position` >= 0 of the endless order."""
        epoch, offset = divmod(position, len(self))
        virtual = self._order(epoch)[offset]
        number = bisect.bisect_right(self._ends, virtual)
        within = virtual - (self._ends[number] - self.sizes[number])
        reader = self.parts[number].reader
        turn, index = divmod(epoch * self.sizes[number] + within, len(reader))
        return Draw(reader, index, turn)

    def _order(self, epoch: int) -> Permutation:
        if self._permutation is None or self._permutation[0] != epoch:
            self._permutation = (epoch, Permutation(len(self), derive_seed(self.seed, "order", epoch)))
        return self._permutation[1]

    def describe(self) -> list[dict[str, Any]]:
        return [part.describe() for part in self.parts]


def parse_size(size: int | str) -> int:
    """20_000_000 from "20M", 558_000 from "558K" (also 1.5M, and plain numbers). Raises `ValueError` otherwise."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMB]?)\s*", str(size), re.IGNORECASE)
    number = round(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if number < 1:
        raise ValueError(f"size {size!r} is not a positive number of samples such as 1000, '558K' or '20M'")
    return number


def _virtual_sizes(parts: Sequence[Part]) -> list[int]:
    weights = [part.weight for part in parts if part.weight is not None]
    if not weights:
        return [len(part.reader) if part.size is None else parse_size(part.size) for part in parts]
    if len(weights) != len(parts) or any(part.size is not None for part in parts):
        raise ValueError("give every part of a mixture a weight, or none; a weight excludes a size")
    if any(not weight > 0 for weight in weights):
        raise ValueError(f"weights must be positive; given: {weights}")
    total = sum(len(part.reader) for part in parts)
    return [max(1, round(total * weight / sum(weights))) for weight in weights]
