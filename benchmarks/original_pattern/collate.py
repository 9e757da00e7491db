"""Documents -> a batch padded on the right to its longest (spec B.6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dreamllm.documents import IGNORE_INDEX, EncodedDocument, PictureTransforms, SequenceLayout, load_picture


@dataclass
class PaddedBatch:
    """`input_ids`, `attention_mask`, `labels` int64 [B, T]; `images` [N, 3, h, w] for CLIP and `images_dm`
    [M, C, H, W] to draw, of the whole batch in reading order, or None."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    images: Tensor | None
    images_dm: Tensor | None

    def to(self, device: torch.device | str) -> PaddedBatch:
        found = (getattr(self, field.name) for field in fields(self))
        return PaddedBatch(*(None if tensor is None else tensor.to(device) for tensor in found))


def pad_batch(
    documents: Sequence[EncodedDocument], layout: SequenceLayout, transforms: PictureTransforms
) -> PaddedBatch:
    longest = max(len(document) for document in documents)
    ids, masks, labels = [], [], []
    for document in documents:
        missing = longest - len(document)
        ids.append(torch.tensor(document.input_ids + [layout.pad] * missing))
        masks.append(torch.tensor([1] * len(document) + [0] * missing))
        labels.append(torch.tensor(document.labels + [IGNORE_INDEX] * missing))
    images = [load_picture(source) for document in documents for source in document.images]
    targets = [load_picture(source) for document in documents for source in document.targets]
    return PaddedBatch(
        torch.stack(ids),
        torch.stack(masks),
        torch.stack(labels),
        transforms.vision(images) if images else None,
        transforms.target(targets) if targets else None,
    )
