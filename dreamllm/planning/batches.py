"""What a GPU's batches hold: drawn from the stage's documents, without loading a picture."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from PIL import Image

from dreamllm.data import Mixture, derive_seed
from dreamllm.documents import EncodedDocument, PackedBatch
from dreamllm.documents.batch import Pixels, pack_batch
from dreamllm.workloads import make_processor, model_config, stage_config

DRAWN_DOCUMENTS = 512


@dataclass(frozen=True)
class Load:
    """What a batch holds."""

    documents: float
    tokens: float
    targets: float
    images: float
    pictures: float

    def __mul__(self, factor: float) -> Load:
        return Load(*(value * factor for value in vars(self).values()))


@dataclass
class DrawnBatches:
    """Batches of `micro_batch` documents: `mean` is what they hold on average, `typical` the one nearest to it."""

    mean: Load
    typical: list[EncodedDocument]
    groups: list[list[EncodedDocument]]

    def largest(self, bytes_per_token: float, bytes_per_picture: float) -> list[EncodedDocument]:
        """The one whose activations take most memory."""

        def size(group: list[EncodedDocument]) -> float:
            load = load_of(group)
            return bytes_per_token * load.tokens + bytes_per_picture * load.pictures

        return max(self.groups, key=size)


@cache
def draw_documents(stage: str, size: str, seed: int = 0) -> tuple[EncodedDocument, ...]:
    """Encoded documents in the order in which training would draw them; their pictures are one grey pixel."""
    processor, config = make_processor(size), stage_config(stage, size, seed=seed)
    mixture = Mixture(config.data, derive_seed(seed, config.name, "data"))
    pixel = Image.new("RGB", (1, 1))
    drawn = []
    for position in range(DRAWN_DOCUMENTS):
        encoded = processor.encode(mixture.draw(position).document())
        drawn.append(replace(encoded, images=[pixel] * len(encoded.images), targets=[pixel] * len(encoded.targets)))
    return tuple(drawn)


def draw_batches(stage: str, size: str, micro_batch: int, seed: int = 0) -> DrawnBatches:
    """Groups the drawn documents by `micro_batch`, several times in different orders."""
    documents = list(draw_documents(stage, size, seed))
    while len(documents) < 4 * micro_batch:
        documents = documents * 2
    groups = []
    order = random.Random(derive_seed(seed, "groups", micro_batch))
    for _ in range(4):
        groups += [documents[i : i + micro_batch] for i in range(0, len(documents) - micro_batch + 1, micro_batch)]
        order.shuffle(documents)
    mean = load_of(documents) * (micro_batch / len(documents))
    return DrawnBatches(mean, min(groups, key=lambda group: _apart(load_of(group), mean)), groups)


def load_of(documents: Sequence[EncodedDocument]) -> Load:
    return Load(
        documents=len(documents),
        tokens=sum(map(len, documents)),
        targets=sum(sum(label >= 0 for label in document.labels[1:]) for document in documents),
        images=sum(len(document.images) for document in documents),
        pictures=sum(len(document.targets) for document in documents),
    )


def _apart(load: Load, mean: Load) -> float:
    return abs(load.tokens / mean.tokens - 1) + abs(load.pictures - mean.pictures) / max(1.0, mean.pictures)


class _NoPictures:
    """Picture transforms whose results have the right shape and no content."""

    def __init__(self, size: str) -> None:
        config = model_config(size)
        self.vision_side = config.vision_config.image_size
        self.target_shape = (config.picture_channels, config.picture_size, config.picture_size)

    def vision_pixels(self, images: Sequence[Image.Image]) -> Pixels:
        return Pixels(torch.empty(len(images), 3, self.vision_side, self.vision_side))

    def target_pixels(self, images: Sequence[Image.Image]) -> Pixels:
        return Pixels(torch.empty(len(images), *self.target_shape))


def pack(documents: Sequence[EncodedDocument], size: str) -> PackedBatch:
    """The batch of `documents`, with pictures of the right shape and no content."""
    return pack_batch(documents, model_config(size).layout(), _NoPictures(size))
