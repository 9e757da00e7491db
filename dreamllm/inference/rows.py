"""Rows of different lengths on one key-value cache.

Suffixes: B rows, L columns of the cache, T new columns, H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from dreamllm.model import DreamLLM


class Rows:
    """B sequences that advance together by different numbers of positions.

    Each pass appends one block of columns, as wide as the longest new piece. A shorter piece leaves holes at the end
    of its row's block: masked for ever, and without a position of their own. A row's positions count its real tokens
    only, so what a row computes does not depend on the other rows.
    """

    def __init__(self, model: DreamLLM, count: int) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.language_model.config)
        self._real_BL = torch.zeros(count, 0, dtype=torch.long, device=model.device)
        self._lengths_B = torch.zeros(count, dtype=torch.long, device=model.device)

    def advance(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Appends one piece of embeddings [n, H] per row (n may be 0) and returns the final states [n, H] of each."""
        widths = [piece.shape[0] for piece in pieces]
        widest = max(widths)
        embeds_BTH = pieces[0].new_zeros(len(pieces), widest, pieces[0].shape[1])
        for row, piece in enumerate(pieces):
            embeds_BTH[row, : widths[row]] = piece
        columns = torch.arange(widest, device=self._model.device)
        widths_B = torch.tensor(widths, device=self._model.device)
        self._real_BL = torch.cat([self._real_BL, (columns < widths_B[:, None]).long()], dim=1)
        states_BTH = self._model.decoder(
            inputs_embeds=embeds_BTH,
            attention_mask=self._real_BL,
            position_ids=(self._lengths_B[:, None] + columns).clamp(max=self._model.layout.max_length - 1),
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        self._lengths_B = self._lengths_B + widths_B
        return [states_BTH[row, :width] for row, width in enumerate(widths)]

    def keep(self, rows: Sequence[int]) -> None:
        """Forgets all rows but these, which keep their order."""
        index = torch.tensor(list(rows), dtype=torch.long, device=self._model.device)
        self._cache.batch_select_indices(index)
        self._real_BL, self._lengths_B = self._real_BL[index], self._lengths_B[index]
