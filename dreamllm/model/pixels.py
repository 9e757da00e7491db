"""Pictures -> bytes and what they stand for, with no more copies than needed: data loading waits for little else.

The image processor of transformers moves each picture between Pillow and NumPy three times and computes in float64.
What it does to a pixel depends on the pixel's value and channel alone, so a table of 3 x 256 entries, which the
processor itself fills, stands for it: the same bits. Making float32 of 512 x 512 pixels took 2.3 ms of the 10 ms in
which a picture was loaded, most of it to get the memory; now the device looks the bytes up. Pillow resizes with scalar
instructions, 3 ms to 512 x 512 and as much again to 224 x 224, also what the crop then cuts away;
`dreamkernels.resize_crop` gives the same bits in 0.8 ms and 0.6 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from dreamkernels import resize_crop, resizes_pictures
from dreamllm.documents.batch import Pixels, empty_bytes

_FILTERS: dict[int, Literal["bilinear", "bicubic"]] = {
    Image.Resampling.BILINEAR: "bilinear",
    Image.Resampling.BICUBIC: "bicubic",
}
_DOWN_FIRST_FROM = 13
"""The version of Pillow from which on tall pictures are resized along their height first."""


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
    """`VisionPixels(processor)(images)`: what the CLIP image processor makes of RGB pictures, [N, 3, h, w]."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self._tables: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, images: Sequence[Image.Image]) -> Pixels:
        plain = _Plain.of(self.processor)
        if plain is None or any(image.mode != "RGB" for image in images):
            return Pixels(self.processor(list(images), return_tensors="pt")["pixel_values"].float())
        values = empty_bytes(len(images), plain.height, plain.width, 3)
        for image, row in zip(images, values.numpy(), strict=True):
            _write_resized(image, plain, row)
        return Pixels(values.permute(0, 3, 1, 2), self._table(plain))

    def _table(self, plain: _Plain) -> Tensor:
        """[3, 256]: what becomes of each value of each channel."""
        if plain.values not in self._tables:
            ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
            made = self.processor(Image.fromarray(ramp), do_resize=False, do_center_crop=False, return_tensors="np")
            table = np.array(made["pixel_values"][0], dtype=np.float32).reshape(3, 256)
            self._tables[plain.values] = torch.from_numpy(table)
        return self._tables[plain.values]


def _write_resized(image: Image.Image, plain: _Plain, out: np.ndarray) -> None:
    width, height = image.size
    long = int(plain.short * max(image.size) / min(image.size))
    size = (plain.short, long) if width <= height else (long, plain.short)
    _write_centre(image, size, plain.resample, out)


def _write_centre(image: Image.Image, size: tuple[int, int], resample: int, out: np.ndarray) -> None:
    """Writes the centre of `image` resized to `size` into `out`, uint8 [h, w, 3]."""
    height, width, _ = out.shape
    window = (size[0] - width) // 2, (size[1] - height) // 2, width, height
    if resample in _FILTERS and image.size != size and resizes_pictures():
        resize_crop(np.asarray(image), size, window, _FILTERS[resample], out, _down_first(image.size, size))
    else:
        np.copyto(out, np.asarray(_centre(image, size, window, resample)))


def _centre(image: Image.Image, size: tuple[int, int], window: tuple[int, int, int, int], resample: int) -> Image.Image:
    if image.size != size:
        # Not with Pillow's `box`, which would leave out what is cut off: it rounds to float32 and gives other pixels.
        image = image.resize(size, resample)
    left, top, width, height = window
    return image.crop((left, top, left + width, top + height))


def _down_first(before: tuple[int, int], after: tuple[int, int]) -> bool:
    """Whether Pillow resizes along the height first. It rounds in between, so the order shows."""
    width, height = (b - a for b, a in zip(before, after, strict=True))
    return int(PIL.__version__.partition(".")[0]) >= _DOWN_FIRST_FROM and height > max(0, 2 * width)


def target_pixels(images: Sequence[Image.Image], size: int, channels: int) -> Pixels:
    """RGB pictures -> [N, channels, size, size] for [-1, 1]: short side to `size` (bilinear), the centre."""
    values = empty_bytes(len(images), size, size, channels)
    for image, row in zip(images, values.numpy(), strict=True):
        ratio = size / min(image.size)
        width, height = (max(size, round(side * ratio)) for side in image.size)
        if channels == 3:
            _write_centre(image, (width, height), Image.Resampling.BILINEAR, row)
            continue
        window = (width - size) // 2, (height - size) // 2, size, size
        centre = _centre(image, (width, height), window, Image.Resampling.BILINEAR)
        np.copyto(row[..., 0], np.asarray(centre.convert("L")))
    table = torch.arange(256, dtype=torch.float32).div_(127.5).sub_(1.0)
    return Pixels(values.permute(0, 3, 1, 2), table.repeat(channels, 1))


def check_pixels(pixels: Tensor) -> None:
    """Raises `ValueError` for pictures as bytes, which a batch of the loader holds before it is on its device."""
    if not pixels.is_floating_point():
        raise ValueError(f"pixel values must be floating, not {pixels.dtype}: batch.to(device) makes them of bytes")
