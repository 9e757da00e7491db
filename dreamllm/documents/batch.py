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

_TOGETHER = 4
"""Pictures that are looked up at once: of more, the indices take new memory each time (2.4 instead of 0.9 ms each)."""


@dataclass(frozen=True)
class Pixels:
    """Pictures [N, C, h, w]: pixel values in float32, or bytes with a `table`.

    `table`, float32 [C, 256], holds what each byte of each channel stands for. Bytes are a quarter of the memory to be
    written, handed over between processes and copied to a device; there, `expanded` looks them up.
    """

    values: torch.Tensor
    table: torch.Tensor | None = None

    def expanded(self) -> torch.Tensor:
        """The pixel values, float32, on the device of `values`: the same bits on every device."""
        if self.table is None:
            return self.values
        pixels = torch.empty(self.values.shape, dtype=self.table.dtype, device=self.values.device)
        for values, into in zip(self.values.split(_TOGETHER), pixels.split(_TOGETHER), strict=True):
            for channel, meanings in enumerate(self.table):
                places = values[:, channel]
                into[:, channel] = meanings.index_select(0, places.reshape(-1).int()).view(places.shape)
        return pixels


class PictureTransforms(Protocol):
    """Turns pictures into tensors; implemented by the processor."""

    def vision_pixels(self, images: Sequence[Image.Image]) -> Pixels:
        """RGB pictures -> what CLIP reads, [N, 3, h, w]."""

    def target_pixels(self, images: Sequence[Image.Image]) -> Pixels:
        """RGB pictures -> diffusion targets [N, C, H, W], which stand for values in [-1, 1]."""


@dataclass
class PackedBatch:
    """Sequences laid end to end. T tokens, S sequences, N input pictures, M created pictures, Q dream queries.

    - `input_ids`, `position_ids`, `labels`: int64 [T]. Labels are unshifted and never cross sequences.
    - `cu_seqlens`: int32 [S + 1], cumulative lengths; `max_seqlen`: the longest sequence.
    - `splice_index`: int64 [T], -1 for an ordinary token; otherwise the row of the concatenation of all image
      features [N * tokens_per_image] and the dream queries [Q] that stands at this position.
    - `dream_positions`: int64 [M, Q], positions of the queries of each created picture, in reading order.
    - `loss_positions`, `loss_targets`: int64 [K], positions that predict a learned token, and that token.
    - `pixel_values`: float32 [N, 3, h, w] or None; `target_pixel_values`: float32 [M, C, H, W] or None. In a batch that
      was packed `as_bytes` they are uint8, and `pixel_table` [3, 256] and `target_pixel_table` [C, 256] say what each
      byte stands for (`Pixels`); `to` makes them float32 on the device.
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
    pixel_table: torch.Tensor | None = None
    target_pixel_table: torch.Tensor | None = None
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
        """The batch on `device`, with pictures as float32 pixel values."""
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return replace(
            moved,
            pixel_values=_expanded(moved.pixel_values, moved.pixel_table),
            target_pixel_values=_expanded(moved.target_pixel_values, moved.target_pixel_table),
            pixel_table=None,
            target_pixel_table=None,
        )

    def pin_memory(self) -> PackedBatch:
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function) -> PackedBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: function(v) for k, v in values.items() if isinstance(v, torch.Tensor)})


def _expanded(values: torch.Tensor | None, table: torch.Tensor | None) -> torch.Tensor | None:
    return None if values is None else Pixels(values, table).expanded()


def empty_bytes(*shape: int) -> torch.Tensor:
    """An uninitialised uint8 tensor to write pictures into.

    In a worker process of a `DataLoader` it lies in shared memory, in which it would else be copied to be handed over.
    """
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's collation
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


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
    as_bytes: bool = False,
) -> PackedBatch:
    """Packs `documents` into one batch, loading and transforming their pictures.

    `with_null` appends the empty prompt as one more sequence (needed for condition dropout). `moments`, one of
    [2c, h', w'] or None for each picture to create in reading order: where they are known the picture is not touched
    (the VAE's posterior, see `PackedBatch.target_moments`). `as_bytes` leaves pictures as bytes where the transform
    allows it, until `PackedBatch.to` makes pixel values of them. Raises `ValueError` for an empty list, an id outside
    the vocabulary, or slots that do not match the pictures; `PictureError` for a picture that cannot be read.
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
    read = transforms.vision_pixels(_load(images)) if images else None
    drawn = transforms.target_pixels(_load(targets)) if targets else None
    dream_starts = _absolute([s.dream_starts for s in documents], offsets)
    queries = np.arange(layout.num_dream_queries)
    batch = PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(positions),
        labels=torch.from_numpy(labels),
        cu_seqlens=torch.from_numpy(offsets.astype(np.int32)),
        splice_index=torch.from_numpy(_splice_index(sequences, offsets, len(images), layout)),
        dream_positions=torch.from_numpy(dream_starts[:, None] + queries),
        loss_positions=torch.from_numpy(targets_at - 1),
        loss_targets=torch.from_numpy(labels[targets_at]),
        max_seqlen=int(lengths.max()),
        pixel_values=None if read is None else read.values,
        pixel_table=None if read is None else read.table,
        target_pixel_values=None if drawn is None else drawn.values,
        target_pixel_table=None if drawn is None else drawn.table,
        target_moments=known,
        unknown_moments=unknown,
        null_positions=torch.from_numpy(offsets[-2] + 2 + queries) if with_null else None,
        names=tuple(s.name for s in documents),
        query_spans=_query_spans(sequences, offsets, layout),
    )
    return batch if as_bytes else batch.to("cpu")


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
