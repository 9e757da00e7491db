"""Synthetic documents with the lengths of the paper's data, as a function of (seed, index).

Lengths are those of real data, in tokens; a size's `text_scale` shortens them:

- pair: a caption of 45 tokens in the median (8 to 200) and one picture; sequences of 300 to 330 ids when it is read.
- interleaved: 335 tokens on average, lognormal, and 1 + Poisson(2.4) pictures. MMC4-core has 329 tokens and 4.1
  pictures per document before pictures that match weakly are dropped.
- conversation: 1 to 4 turns with questions of about 15 and answers of about 60 tokens, one picture, as LLaVA-Instruct.
- drawing order: a request of about 45 tokens, answered by one created picture: instructions made of captions.
- interleaved order: a request of about 30 tokens, answered by an interleaved document.
- picture prompt: a picture and 20 tokens, to be answered.
- drawing prompt: 10 to 40 tokens, to be drawn.

Words and pictures are random: what they cost does not depend on what they show.
"""

from __future__ import annotations

import io
import itertools
import math
import random
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image

from dreamllm.data import Reader, derive_seed
from dreamllm.documents import VICUNA_V1_1, Document, conversation, instruction_interleaved, interleaved, pair, prompt
from dreamllm.workloads.sizes import ORDINARY_TOKENS, ModelSize, model_size

PICTURE_POOL = 24
"""Different pictures per reader, encoded once: making them is no part of what is measured."""


class Drawer:
    """Draws the parts of one document."""

    def __init__(self, size: ModelSize, seed: int) -> None:
        self.rng = random.Random(seed)
        self.words, self.scale = size.words, size.text_scale
        self.pool = picture_pool(_picture_side(size))

    def text(self, median: float, spread: float, least: int = 1, most: int = 100_000) -> str:
        """Words, lognormal in number."""
        drawn = self.rng.lognormvariate(math.log(median), spread)
        return self.words_of(round(min(max(drawn, least), most) * self.scale))

    def words_of(self, count: int) -> str:
        first = len(ORDINARY_TOKENS)
        return " ".join(f"w{self.rng.randrange(first, self.words)}" for _ in range(max(1, count)))

    def pictures(self, count: int) -> list[bytes]:
        return self.rng.sample(self.pool, count)

    def poisson(self, mean: float) -> int:
        # Knuth's product of uniforms: means are small.
        limit, product, count = math.exp(-mean), self.rng.random(), 0
        while product > limit:
            product *= self.rng.random()
            count += 1
        return count


def _pair(draw: Drawer, mode: str, name: str) -> Document:
    (picture,) = draw.pictures(1)
    caption = draw.text(45, 0.4, 8, 200)
    if mode == "both":
        mode = draw.rng.choice(("comprehension", "creation"))
    return pair(picture, caption, "creation" if mode == "creation" else "comprehension", name)


def _chunks(draw: Drawer) -> tuple[list[str], list[tuple[int, bytes]]]:
    """Texts, and a picture after each but the last."""
    count = min(1 + draw.poisson(2.4), 12)
    words = draw.text(280, 0.6).split()
    cuts = sorted(draw.rng.randrange(len(words) + 1) for _ in range(count))
    bounds = [0, *cuts, len(words)]
    texts = [" ".join(words[a:b]) for a, b in itertools.pairwise(bounds)]
    return texts, list(enumerate(draw.pictures(count)))


def _interleaved(draw: Drawer, name: str) -> Document:
    texts, pictures = _chunks(draw)
    return interleaved(texts, pictures, "joint", name)


def _interleaved_order(draw: Drawer, name: str) -> Document:
    texts, pictures = _chunks(draw)
    return instruction_interleaved(draw.text(30, 0.4), texts, pictures, VICUNA_V1_1, "joint", name)


def _conversation(draw: Drawer, name: str) -> Document:
    turns = []
    for number in range(draw.rng.randint(1, 4)):
        question = draw.text(15, 0.5, 3)
        turns.append(("user", question if number else f"<image> {question}"))
        turns.append(("assistant", draw.text(60, 0.7, 2)))
    return conversation(turns, draw.pictures(1), VICUNA_V1_1, name=name)


def _drawing_order(draw: Drawer, name: str) -> Document:
    turns = (("user", draw.text(45, 0.4, 8, 200)), ("assistant", "<dream>"))
    return conversation(turns, draw.pictures(1), VICUNA_V1_1, name=name)


def _picture_prompt(draw: Drawer, name: str) -> Document:
    return prompt(f"<image> {draw.words_of(round(20 * draw.scale))}", draw.pictures(1), name=name)


def _drawing_prompt(draw: Drawer, name: str) -> Document:
    return prompt(draw.words_of(round(draw.rng.randint(10, 40) * draw.scale)), name=name)


DOCUMENT_KINDS: dict[str, Callable[[Drawer, str], Document]] = {
    "comprehension pair": lambda draw, name: _pair(draw, "comprehension", name),
    "creation pair": lambda draw, name: _pair(draw, "creation", name),
    "pair": lambda draw, name: _pair(draw, "both", name),
    "interleaved": _interleaved,
    "conversation": _conversation,
    "drawing order": _drawing_order,
    "interleaved order": _interleaved_order,
}
"""What stages train on."""

PROMPT_KINDS: dict[str, Callable[[Drawer, str], Document]] = {
    "picture prompt": _picture_prompt,
    "drawing prompt": _drawing_prompt,
}
"""What a model is asked."""

_KINDS = {**DOCUMENT_KINDS, **PROMPT_KINDS}


class SyntheticDocuments(Reader):
    """`count` documents of `kind` for a model of size `size`. Document i follows from (seed, kind, i) alone.

    Raises `ValueError` for an unknown kind or size.
    """

    def __init__(self, kind: str, size: str, count: int, seed: int = 0) -> None:
        if kind not in _KINDS:
            raise ValueError(f"unknown kind of document {kind!r}; known: {', '.join(_KINDS)}")
        self.kind, self.size, self.count, self.seed = kind, model_size(size), count, seed
        self.name = f"synthetic {kind}"

    def __len__(self) -> int:
        return self.count

    def document(self, index: int, epoch: int = 0) -> Document:
        if not 0 <= index < self.count:
            raise IndexError(f"index {index} is outside [0, {self.count})")
        draw = Drawer(self.size, derive_seed(self.seed, self.kind, index))
        return _KINDS[self.kind](draw, f"{self.name} {index}")


def _picture_side(size: ModelSize) -> int:
    """A little larger than what the model creates or reads, as after the usual download at a fixed size."""
    created = size.unet["sample_size"] * 2 ** (len(size.vae["block_out_channels"]) - 1)
    return round(1.125 * max(created, size.vision["image_size"]))


@cache
def picture_pool(side: int) -> tuple[bytes, ...]:
    """JPEG files of smooth random pictures: `side` pixels on the short side, up to half as much more on the other."""
    rng = np.random.default_rng(derive_seed("pictures", side))
    pool = []
    for _ in range(PICTURE_POOL):
        width, height = side, round(side * rng.uniform(1, 1.5))
        coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = np.clip(smooth + rng.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "JPEG", quality=90)
        pool.append(file.getvalue())
    return tuple(pool)
