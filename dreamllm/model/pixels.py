"""Pictures -> pixel values, with no more copies than needed: data loading waits for little else.

The image processor of transformers moves each picture between Pillow and NumPy three times and computes in float64.
What it does to a pixel depends on the pixel's value and channel alone, so a table of 3 x 256 entries, which the
processor itself fills, stands for it: the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dreamllm.documents.batch import empty_pixels


@dataclass(frozen=True)
class _Plain:
    """What an image processor of the usual kind does: short side to `short`, the centre `height` x `width`, a table."""

    short: int
    height: int
    width: int
    resample: int
    values: tuple[Any, ...]

    @staticmethod
    def of(processor: Any) -> _Plain | None:
        """None for a processor that does something else."""
        size, crop = _given(processor.size), _given(processor.crop_size)
        short = size.pop("shortest_edge", None)
        if size or short is None or not (processor.do_resize and processor.do_center_crop):
            return None
        if getattr(processor, "do_pad", None) or max(crop["height"], crop["width"]) > short:
            return None
        statistics = tuple(processor.image_mean), tuple(processor.image_std)
        values = (processor.do_rescale, processor.rescale_factor, processor.do_normalize, *statistics)
        return _Plain(short, crop["height"], crop["width"], int(processor.resample), values)


def _given(size: Any) -> dict[str, int]:
    return {name: value for name, value in dict(size).items() if value is not None}


class VisionPixels:
    """`VisionPixels(processor)(images)`: what the CLIP image processor makes of RGB pictures, [N, 3, h, w] float32."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self._tables: dict[tuple[Any, ...], np.ndarray] = {}

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        plain = _Plain.of(self.processor)
        if plain is None or any(image.mode != "RGB" for image in images):
            return self.processor(list(images), return_tensors="pt")["pixel_values"].float()
        table = self._table(plain)
        pixels = empty_pixels(len(images), 3, plain.height, plain.width)
        for image, row in zip(images, pixels.numpy(), strict=True):
            channels = np.asarray(_resized(image, plain))
            for number, values in enumerate(table):
                np.take(values, channels[..., number], out=row[number], mode="clip")  # indices fit; without a buffer
        return pixels

    def _table(self, plain: _Plain) -> np.ndarray:
        """[3, 256]: what becomes of each value of each channel."""
        if plain.values not in self._tables:
            ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
            made = self.processor(Image.fromarray(ramp), do_resize=False, do_center_crop=False, return_tensors="np")
            table = np.asarray(made["pixel_values"][0], dtype=np.float32).reshape(3, 256)
            self._tables[plain.values] = table
        return self._tables[plain.values]


def _resized(image: Image.Image, plain: _Plain) -> Image.Image:
    width, height = image.size
    long = int(plain.short * max(image.size) / min(image.size))
    size = (plain.short, long) if width <= height else (long, plain.short)
    return _centre(image, size, (plain.width, plain.height), plain.resample)


def _centre(image: Image.Image, size: tuple[int, int], crop: tuple[int, int], resample: int) -> Image.Image:
    """The centre `crop` (width, height) of `image` resized to `size`."""
    if image.size != size:
        # Not with Pillow's `box`, which would leave out what is cut off: it rounds to float32 and gives other pixels.
        image = image.resize(size, resample)
    left, top = ((whole - part) // 2 for whole, part in zip(size, crop, strict=True))
    return image if crop == size else image.crop((left, top, left + crop[0], top + crop[1]))


def target_pixels(images: Sequence[Image.Image], size: int, channels: int) -> Tensor:
    """RGB pictures -> [N, channels, size, size] in [-1, 1], float32: short side to `size` (bilinear), the centre."""
    pixels = empty_pixels(len(images), channels, size, size)
    for image, row in zip(images, pixels.numpy(), strict=True):
        ratio = size / min(image.size)
        width, height = (max(size, round(side * ratio)) for side in image.size)
        centre = _centre(image, (width, height), (size, size), Image.Resampling.BILINEAR)
        values = np.asarray(centre.convert("L") if channels == 1 else centre)
        np.copyto(row, values[None] if channels == 1 else values.transpose(2, 0, 1))
        row /= 127.5
        row -= 1.0
    return pixels
