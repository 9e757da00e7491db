"""Placing rows of several sources into a sequence of token embeddings: the definition."""

from collections.abc import Sequence

import torch


def splice_embeddings(token_embeds: torch.Tensor, sources: Sequence[torch.Tensor], index: torch.Tensor) -> torch.Tensor:
    # Row 0 of the table stands in for "keep", so that the lookup is defined everywhere, also without any source row.
    table = torch.cat([token_embeds.new_zeros(1, token_embeds.shape[1]), *sources])
    return torch.where((index >= 0)[:, None], table[index.long().clamp_min(-1) + 1], token_embeds)
