"""Finding picture slots in padded ids, on the ids' device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dreamllm.documents.layout import SequenceLayout


@dataclass
class SlotIndex:
    """Positions (in the flattened [B * T] ids) of the first patch of each input picture and first dream query."""

    image_starts: Tensor
    dream_starts: Tensor
    num_positions: int
    layout: SequenceLayout

    @property
    def num_images(self) -> int:
        return self.image_starts.numel()

    def dream_positions(self) -> Tensor:
        """int64 [M, Q]: positions of the queries of each created picture, in reading order."""
        return self.dream_starts[:, None] + self._range(self.layout.num_dream_queries)

    def splice_index(self, images: int, queries: bool) -> Tensor:
        """int64 [B * T] for `splice_embeddings`: the first `images` pictures' features, then the queries if wanted."""
        index = torch.full((self.num_positions,), -1, device=self.image_starts.device)
        patches = self.layout.tokens_per_image
        rows = self._range(images)[:, None] * patches + self._range(patches)
        index[self.image_starts[:images, None] + self._range(patches)] = rows
        if queries:
            index[self.dream_positions()] = images * patches + self._range(self.layout.num_dream_queries)
        return index

    def _range(self, count: int) -> Tensor:
        return torch.arange(count, device=self.image_starts.device)


def find_slots(input_ids: Tensor, layout: SequenceLayout, first_call: bool) -> SlotIndex | None:
    """Slots in ids [B, T]; None on later calls with a cache when the new ids open no slot.

    A slot is a start token followed by its patch tokens; a start token that ends the ids opens none (it was just
    written by the model). Raises `ValueError` for a slot that the end of the row cuts off.
    """
    starts = {}
    for name, token, length in (
        ("image", layout.im_start, layout.tokens_per_image),
        ("dream", layout.dream_start, layout.num_dream_queries),
    ):
        opened = torch.zeros_like(input_ids, dtype=torch.bool)
        opened[:, :-1] = (input_ids[:, :-1] == token) & (input_ids[:, 1:] == layout.im_patch)
        rows, columns = opened.nonzero(as_tuple=True)
        if columns.numel() and bool((columns + length >= input_ids.shape[1]).any()):
            raise ValueError(
                f"the {name} slot of {length} tokens is cut off at the end of the input ({input_ids.shape[1]} tokens)"
            )
        starts[name] = rows * input_ids.shape[1] + columns + 1
    if not first_call and not starts["image"].numel() and not starts["dream"].numel():
        return None
    return SlotIndex(starts["image"], starts["dream"], input_ids.numel(), layout)
