"""Which attention the model's parts run, and the padded grid for a decoder that cannot run packed sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dreamkernels.integrations.transformers_attention import NAME as ATTENTION_NAME
from dreamkernels.integrations.transformers_attention import register

__all__ = ["ATTENTION_NAME", "PackedLayout", "use_dreamkernels_attention"]


def use_dreamkernels_attention(model: PreTrainedModel) -> None:
    """Makes a transformers model that would run torch's attention run dreamkernels.attention instead.

    A model that was asked for another one, or that does not use transformers' attention interface, keeps its own.
    """
    if getattr(model, "_supports_attention_backend", False) and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(register())


@dataclass
class PackedLayout:
    """Where the tokens of S packed sequences stand in an [S, L] grid (L: the longest).

    `to_grid`: int64 [S * L], the packed position of each grid cell (cells beyond a sequence repeat position 0);
    `from_grid`: int64 [T], the grid cell of each packed position. Both are None when all sequences are equally long:
    the pack is the grid.
    """

    num_sequences: int
    max_seqlen: int
    to_grid: Tensor | None
    from_grid: Tensor | None

    @staticmethod
    def from_cu_seqlens(cu_seqlens: Tensor, max_seqlen: int, num_tokens: int) -> PackedLayout:
        """cu_seqlens: int32 [S + 1]. Computed on its device without a host synchronisation."""
        count = cu_seqlens.numel() - 1
        if count * max_seqlen == num_tokens:
            return PackedLayout(count, max_seqlen, None, None)
        starts = cu_seqlens[:-1].long()
        offsets = torch.arange(max_seqlen, device=cu_seqlens.device)
        inside = offsets < cu_seqlens.diff()[:, None]
        to_grid = torch.where(inside, starts[:, None] + offsets, 0).flatten()
        positions = torch.arange(num_tokens, device=cu_seqlens.device)
        row = torch.searchsorted(cu_seqlens[1:].long(), positions, right=True)
        from_grid = row * max_seqlen + positions - starts[row]
        return PackedLayout(count, max_seqlen, to_grid, from_grid)

    def gather(self, packed: Tensor) -> Tensor:
        """[T, ...] -> [S, L, ...]."""
        cells = packed if self.to_grid is None else packed[self.to_grid]
        return cells.unflatten(0, (self.num_sequences, self.max_seqlen))

    def scatter(self, grid: Tensor) -> Tensor:
        """[S, L, ...] -> [T, ...]."""
        cells = grid.flatten(0, 1)
        return cells if self.from_grid is None else cells[self.from_grid]
