"""Encoded documents -> one packed batch: no padding, documents never see each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from dreamllm.documents.encode import EncodedDocument
from dreamllm.documents.layout import IGNORE_INDEX, SequenceLayout
from dreamllm.documents.picture import PictureSource, load_picture


class PictureTransforms(Protocol):
    """Turns pictures into tensors; implemented by the processor."""

    def vision(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """RGB pictures -> CLIP pixel values [N, 3, h, w], float32."""

    def target(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """RGB pictures -> diffusion targets [N, C, H, W] in [-1, 1], float32."""


@dataclass
class PackedBatch:
    """Sequences laid end to end. T tokens, S sequences, N input pictures, M created pictures, Q dream queries.

    - `input_ids`, `position_ids`, `labels`: int64 [T]. Labels are unshifted and never cross sequences.
    - `cu_seqlens`: int32 [S + 1], cumulative lengths; `max_seqlen`: the longest sequence.
    - `splice_index`: int64 [T], -1 for an ordinary token; otherwise the row of the concatenation of all image
      features [N * tokens_per_image] and the dream queries [Q] that stands at this position.
    - `dream_positions`: int64 [M, Q], positions of the queries of each created picture, in reading order.
    - `loss_positions`, `loss_targets`: int64 [K], positions that predict a learned token, and that token.
    - `pixel_values`: float32 [N, 3, h, w] or None; `target_pixel_values`: float32 [M, C, H, W] or None.
    - `target_latents`: float32 [M, c, h', w'] or None, scaled; where they are known, no picture is encoded.
    - `target_moments`: [M, 2c, h', w'] or None, mean and log-variance of the VAE's posterior of each created picture,
      not scaled. `target_pixel_values` then holds only the pictures whose moments are not known (None: all are), and
      `unknown_moments`, int64 [pictures], their rows.
    - `null_positions`: int64 [Q], the queries of the appended empty prompt, or None when there is none.
    - `query_spans`: for each sequence with dream queries, on the host: its first position, its first query, and the
      position behind its last query.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: torch.Tensor
    splice_index: torch.Tensor
    dream_positions: torch.Tensor
    loss_positions: torch.Tensor
    loss_targets: torch.Tensor
    max_seqlen: int
    pixel_values: torch.Tensor | None = None
    target_pixel_values: torch.Tensor | None = None
    target_latents: torch.Tensor | None = None
    target_moments: torch.Tensor | None = None
    unknown_moments: torch.Tensor | None = None
    null_positions: torch.Tensor | None = None
    names: tuple[str, ...] = ()
    query_spans: tuple[tuple[int, int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def num_documents(self) -> int:
        return len(self.names)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function) -> PackedBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: function(v) for k, v in values.items() if isinstance(v, torch.Tensor)})


def empty_pixels(*shape: int) -> torch.Tensor:
    """An uninitialised float32 tensor to write pictures into.

    In a worker process of a `DataLoader` it lies in shared memory, in which it would else be copied to be handed over.
    """
    if get_worker_info() is None:
        return torch.empty(shape)
    storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(4 * math.prod(shape))  # as torch's collation
    return torch.empty(0).set_(storage).view(shape)


def null_sequence(layout: SequenceLayout) -> EncodedDocument:
    """The empty prompt, `<s>` DRM: its query states are the unconditional condition."""
    encoded = EncodedDocument(name="(empty prompt)")
    encoded.append([layout.bos, *layout.dream_ids()], learn=False)
    encoded.dream_starts.append(2)
    return encoded


def pack_batch(
    documents: Sequence[EncodedDocument],
    layout: SequenceLayout,
    transforms: PictureTransforms,
    with_null: bool = False,
    moments: Sequence[torch.Tensor | None] | None = None,
) -> PackedBatch:
    """Packs `documents` into one batch, loading and transforming their pictures.

    `with_null` appends the empty prompt as one more sequence (needed for condition dropout). `moments`, one of
    [2c, h', w'] or None for each picture to create in reading order: where they are known the picture is not touched
    (the VAE's posterior, see `PackedBatch.target_moments`). Raises `ValueError` for
    an empty list, an id outside the vocabulary, or slots that do not match the pictures; `PictureError` for a picture
    that cannot be read.
    """
    if not documents:
        raise ValueError("a batch needs at least one document")
    for document in documents:
        check_encoded(document, layout)
    sequences = [*documents, null_sequence(layout)] if with_null else list(documents)
    lengths = np.array([len(s) for s in sequences])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    labels = np.concatenate([np.asarray(s.labels, dtype=np.int64) for s in sequences])
    input_ids = np.concatenate([np.asarray(s.input_ids, dtype=np.int64) for s in sequences])
    positions = np.concatenate([np.arange(n) for n in lengths])
    targets_at = np.flatnonzero((labels != IGNORE_INDEX) & (positions > 0))
    images = [image for s in documents for image in s.images]
    targets = [image for s in documents for image in s.targets]
    known, unknown = _moments(moments, len(targets))
    if unknown is not None:
        targets = [targets[i] for i in unknown.tolist()]
    dream_starts = _absolute([s.dream_starts for s in documents], offsets)
    queries = np.arange(layout.num_dream_queries)
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(positions),
        labels=torch.from_numpy(labels),
        cu_seqlens=torch.from_numpy(offsets.astype(np.int32)),
        splice_index=torch.from_numpy(_splice_index(sequences, offsets, len(images), layout)),
        dream_positions=torch.from_numpy(dream_starts[:, None] + queries),
        loss_positions=torch.from_numpy(targets_at - 1),
        loss_targets=torch.from_numpy(labels[targets_at]),
        max_seqlen=int(lengths.max()),
        pixel_values=transforms.vision(_load(images)) if images else None,
        target_pixel_values=transforms.target(_load(targets)) if targets else None,
        target_moments=known,
        unknown_moments=unknown,
        null_positions=torch.from_numpy(offsets[-2] + 2 + queries) if with_null else None,
        names=tuple(s.name for s in documents),
        query_spans=_query_spans(sequences, offsets, layout),
    )


def _moments(
    moments: Sequence[torch.Tensor | None] | None, count: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Stacked moments with zeros where they are not known, and the rows of those; None where none is known."""
    if moments is None or all(row is None for row in moments):
        return None, None
    if len(moments) != count:
        raise ValueError(f"{count} pictures to create but moments of {len(moments)}; give one or None for each")
    empty = torch.zeros_like(next(row for row in moments if row is not None))
    unknown = torch.tensor([i for i, row in enumerate(moments) if row is None], dtype=torch.int64)
    return torch.stack([empty if row is None else row for row in moments]), unknown


def check_encoded(document: EncodedDocument, layout: SequenceLayout) -> None:
    """Raises `ValueError` when ids leave the vocabulary or picture slots do not match the pictures."""
    name = document.name or "(unnamed)"
    ids = np.asarray(document.input_ids, dtype=np.int64)
    outside = np.flatnonzero((ids < 0) | (ids >= layout.vocab_size))
    if outside.size:
        raise ValueError(
            f"document {name}: id {ids[outside[0]]} at position {outside[0]} is outside the vocabulary of "
            f"{layout.vocab_size}; does the tokenizer belong to this model?"
        )
    if len(document.dream_starts) != len(document.targets):
        raise ValueError(
            f"document {name} has {len(document.dream_starts)} dream slots but {len(document.targets)} target pictures"
        )
    if len(document.image_starts) != len(document.images):
        raise ValueError(
            f"document {name} has {len(document.image_starts)} image slots but {len(document.images)} pictures"
        )


def _load(sources: Sequence[PictureSource]) -> list[Image.Image]:
    return [load_picture(source) for source in sources]


def _absolute(starts: Sequence[Sequence[int]], offsets: np.ndarray) -> np.ndarray:
    shifted = [np.asarray(s, dtype=np.int64) + offset for s, offset in zip(starts, offsets, strict=False)]
    return np.concatenate(shifted) if shifted else np.zeros(0, dtype=np.int64)


def _query_spans(
    sequences: Sequence[EncodedDocument], offsets: np.ndarray, layout: SequenceLayout
) -> tuple[tuple[int, int, int], ...]:
    with_queries = [
        (s.dream_starts, int(start)) for s, start in zip(sequences, offsets, strict=False) if s.dream_starts
    ]
    return tuple((o, o + starts[0], o + starts[-1] + layout.num_dream_queries) for starts, o in with_queries)


def _splice_index(
    sequences: Sequence[EncodedDocument], offsets: np.ndarray, num_images: int, layout: SequenceLayout
) -> np.ndarray:
    index = np.full(offsets[-1], -1, dtype=np.int64)
    patches, queries = np.arange(layout.tokens_per_image), np.arange(layout.num_dream_queries)
    image_starts = _absolute([s.image_starts for s in sequences], offsets)
    for k, start in enumerate(image_starts):
        index[start + patches] = k * layout.tokens_per_image + patches
    for start in _absolute([s.dream_starts for s in sequences], offsets):
        index[start + queries] = num_images * layout.tokens_per_image + queries
    return index
