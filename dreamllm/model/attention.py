"""Causal attention over packed sequences for any decoder that uses transformers' attention interface."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

ATTENTION_NAME = "dreamllm"


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


def packed_causal_attention(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scale: float) -> Tensor:
    """Causal attention within each sequence. query [T, H, D], key and value [T, H_kv, D] -> [T, H, D].

    Sequences are laid out as rows of a grid padded on the right; causality keeps the padding out of every real
    position, so no mask is needed.
    """
    q_SHLD, k_SHLD, v_SHLD = (layout.gather(t).transpose(1, 2) for t in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    out_SHLD = F.scaled_dot_product_attention(q_SHLD, k_SHLD, v_SHLD, is_causal=True, scale=scale, enable_gqa=grouped)
    return layout.scatter(out_SHLD.transpose(1, 2))


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_layout: PackedLayout | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The attention that DreamLLM's decoder calls: packed when a `packed_layout` travels with the call, else SDPA."""
    if packed_layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    q_THD, k_THD, v_THD = (t[0].transpose(0, 1) for t in (query, key, value))
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    return packed_causal_attention(q_THD, k_THD, v_THD, packed_layout, scale)[None], None


AttentionInterface.register(ATTENTION_NAME, attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
