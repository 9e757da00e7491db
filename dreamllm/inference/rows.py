"""Rows that advance together on one key-value cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dreamkernels.integrations.decoding import CachedDecoder
from dreamkernels.integrations.paged_cache import KeyValueCache


class Rows:
    """B sequences that advance together by different numbers of positions. What a row computes does not depend on the
    other rows."""

    def __init__(self, decoder: CachedDecoder, cache: KeyValueCache, count: int) -> None:
        self._decoder = decoder
        self._cache = cache
        self._sequences = [cache.new() for _ in range(count)]

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *_: object) -> None:
        self.choose([])

    def advance(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Appends one piece of embeddings [n, H] per row (n may be 0) and returns the final states [n, H] of each."""
        counts = [piece.shape[0] for piece in pieces]
        live = [(sequence, n) for sequence, n in zip(self._sequences, counts, strict=True) if n]
        states = self._decoder.advance(self._cache, [s for s, _ in live], [n for _, n in live], torch.cat(list(pieces)))
        return list(states.split(counts))

    def choose(self, rows: Sequence[int]) -> None:
        """Row i becomes what row `rows[i]` is; rows that are not named end. Nothing is copied but last pages."""
        chosen = [self._cache.fork(self._sequences[row]) for row in rows]
        for sequence in self._sequences:
            self._cache.release(sequence)
        self._sequences = chosen
