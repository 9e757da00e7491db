"""Where the new positions of one pass of a decoder over a key-value cache stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dreamkernels.integrations.paged_cache import CachedSequence, KeyValueCache

MOST_DECODED = 128
"""New positions of a sequence that `decode_attention` takes; longer pieces run `attention`."""


def leading_ones(counts: Sequence[int]) -> int:
    return next((i for i, count in enumerate(counts) if count != 1), len(counts))


@dataclass
class Step:
    """Where the new positions of one pass stand.

    The first `singles` of them are one each of the first sequences; the others are `pieces` of several positions. For
    pieces of one length that `decode_attention` takes, `piece_tokens` is that length; otherwise it is 0 and their keys
    are gathered from `slots` (int64, positions of the flattened pages).
    """

    positions: Tensor  # int32
    token_tables: Tensor  # int32, pages of the sequence of each position
    singles: int
    pieces: int
    piece_tokens: int
    lengths: Tensor  # int32, keys of each sequence, the new ones included
    tables: Tensor
    slots: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0

    @staticmethod
    def plan(
        cache: KeyValueCache, sequences: Sequence[CachedSequence], counts: Sequence[int], device: torch.device
    ) -> Step:
        singles = leading_ones(counts)
        starts = [sequence.length for sequence in sequences]
        cache.extend(sequences, counts)
        tables = cache.block_table(sequences)
        lengths = torch.tensor([sequence.length for sequence in sequences], dtype=torch.int32, device=device)
        if singles == len(counts):
            return Step(lengths - 1, tables, singles, 0, 0, lengths, tables)
        repeats = torch.tensor(counts, device=device)
        positions = torch.cat([torch.arange(s, s + n, dtype=torch.int32) for s, n in zip(starts, counts, strict=True)])
        step = Step(
            positions.to(device),
            tables.repeat_interleave(repeats, dim=0),
            singles,
            len(counts) - singles,
            0,
            lengths,
            tables,
        )
        widths = counts[singles:]
        if len(set(widths)) == 1 and widths[0] <= MOST_DECODED:
            step.piece_tokens = widths[0]
        else:
            step._gather(cache, sequences[singles:], widths, device)
        return step

    def _gather(
        self, cache: KeyValueCache, sequences: Sequence[CachedSequence], widths: Sequence[int], device: torch.device
    ) -> None:
        size = cache.page_size
        inside = torch.arange(size)
        self.slots = torch.cat(
            [(torch.tensor(s.pages)[:, None] * size + inside).flatten()[: s.length] for s in sequences]
        ).to(device)
        lengths = [sequence.length for sequence in sequences]
        self.cu_seqlens_q, self.cu_seqlens_k = (
            torch.tensor([0, *sizes]).cumsum(0).to(device, torch.int32) for sizes in (widths, lengths)
        )
        self.max_seqlen_q, self.max_seqlen_k = max(widths), max(lengths)
