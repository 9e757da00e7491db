"""What a GPU's batches hold: drawn from the stage's documents, without loading a picture."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from PIL import Image

from dreamllm.data import LoaderSettings, Mixture, derive_seed
from dreamllm.data.packing import Held, choose
from dreamllm.documents import EncodedDocument, PackedBatch
from dreamllm.documents.batch import Pixels, pack_batch
from dreamllm.workloads import make_processor, model_config, stage_config

DRAWN_DOCUMENTS = 512
ORDERS = 4
"""In which the drawn documents are grouped; more where that makes too few batches."""
LEAST_BATCHES = 16
LOOK_AHEAD = LoaderSettings.look_ahead
"""Documents that are held back to choose from, as by default in training."""


@dataclass(frozen=True)
class Filling:
    """What a GPU's pass holds: `documents` as they come, or at most `tokens` tokens and `pictures` pictures to create,
    for which documents are chosen. As `batch.per_pass`, or `batch.tokens` and `batch.pictures`, of the recipes."""

    documents: int | None = None
    tokens: int | None = None
    pictures: int | None = None

    def __str__(self) -> str:
        if self.documents is not None:
            return f"micro_batch {self.documents}"
        limit = "" if self.pictures is None else f" and pictures_per_batch {self.pictures}"
        return f"tokens_per_batch {self.tokens}{limit}"


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
    """Batches of one filling: `mean` is what they hold on average, `typical` the one nearest to it."""

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


@cache
def draw_batches(stage: str, size: str, filling: Filling, seed: int = 0) -> DrawnBatches:
    """Groups the drawn documents, in several orders, as the trainer's loader does.

    Documents that create more pictures than a pass may are left out, as in training. Raises `ValueError` when none is
    left, and for a document that does not fit into the tokens on its own.
    """
    drawn = draw_documents(stage, size, seed)
    documents = [each for each in drawn if filling.pictures is None or len(each.targets) <= filling.pictures]
    if not documents:
        raise ValueError(f"every document of {stage} creates more than {filling.pictures} pictures")
    count = filling.documents
    if count is None:
        assert filling.tokens is not None
        orders = max(ORDERS, 2 + math.ceil(LEAST_BATCHES * filling.tokens / sum(map(len, documents))))
        groups = list(_packed(_orders(documents, orders, derive_seed(seed, "groups", filling.tokens)), filling))
        mean = load_of(list(itertools.chain(*groups))) * (1 / len(groups))
    else:
        while len(documents) < ORDERS * count:
            documents = documents * 2
        mean = load_of(documents) * (count / len(documents))
        shuffled = _orders(documents, ORDERS, derive_seed(seed, "groups", count))
        groups = [order[i : i + count] for order in shuffled for i in range(0, len(order) - count + 1, count)]
    return DrawnBatches(mean, min(groups, key=lambda group: _apart(load_of(group), mean)), groups)


def _orders(documents: list[EncodedDocument], number: int, seed: int) -> Iterator[list[EncodedDocument]]:
    order = random.Random(seed)
    for _ in range(number):
        yield list(documents)
        order.shuffle(documents)


def _packed(orders: Iterator[list[EncodedDocument]], filling: Filling) -> Iterator[list[EncodedDocument]]:
    """Ends when too few documents are left to choose from."""
    assert filling.tokens is not None
    waiting: list[EncodedDocument] = []
    for document in itertools.chain.from_iterable(orders):
        waiting.append(document)
        if len(waiting) < LOOK_AHEAD or sum(map(len, waiting)) < 2 * filling.tokens:
            continue
        held = [Held(i, len(each), len(each.targets)) for i, each in enumerate(waiting)]
        chosen = set(choose(held, filling.tokens, filling.pictures))
        yield [waiting[i] for i in sorted(chosen)]
        waiting = [each for i, each in enumerate(waiting) if i not in chosen]


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
