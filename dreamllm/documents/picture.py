"""Loading of pictures from the forms in which they arrive."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

PictureSource = Image.Image | np.ndarray | bytes | Path | str
"""A PIL image, an array [H, W], [H, W, 3] or [H, W, 4] of uint8, encoded bytes, or a path."""


FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
"""What is decoded, where Pillow has it. Others are refused: some of Pillow's decoders start programs (EPS)."""

_ORIENTATION = 0x0112  # Exif's tag

MAX_PIXELS = 89_478_485
"""The largest picture that is decoded (256 MiB as RGB): a small file can declare any size."""


class PictureError(ValueError):
    """A picture that is missing, truncated, too large or not a picture. The message names it."""


class OversizedPictureError(PictureError):
    """A picture that declares more pixels than are decoded."""


def load_picture(source: PictureSource, name: str = "") -> Image.Image:
    """Returns the picture as an upright RGB image; transparency is composited on white. If it is one, itself.

    Raises `PictureError` naming the picture when it is missing, truncated, not a picture, has no pixels, or more than
    `MAX_PIXELS`.
    """
    label = _label(source, name)
    with _explained(label):
        image = _open(source, label)
        image.load()
        if image is source:
            return _to_rgb(ImageOps.exif_transpose(image) if image.getexif().get(_ORIENTATION, 1) != 1 else image)
        ImageOps.exif_transpose(image, in_place=True)  # nobody else has it: no copy
        return _to_rgb(image)


def picture_size(source: PictureSource, name: str = "") -> tuple[int, int]:
    """Width and height in pixels as stored, from the file's header: nothing is decoded. Raises `PictureError`."""
    label = _label(source, name)
    with _explained(label):
        if isinstance(source, str | Path):
            with open(source, "rb") as file:
                return _opened(file, label).size
        return _open(source, label).size


def _label(source: PictureSource, name: str) -> str:
    if not isinstance(source, Image.Image | np.ndarray | bytes | str | Path):
        raise TypeError(f"a picture must be a PIL image, array, bytes or path, not {type(source).__name__}")
    if isinstance(source, bytes):
        return name or f"of {len(source)} bytes"
    return name or (str(source) if isinstance(source, str | Path) else type(source).__name__)


@contextmanager
def _explained(label: str) -> Iterator[None]:
    """Turns what Pillow's decoders raise on hostile bytes, which is nearly anything, into `PictureError`."""
    try:
        yield
    except (PictureError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise PictureError(f"picture {label} does not exist") from error
    except UnidentifiedImageError as error:
        raise PictureError(f"picture {label} is not an image file that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise OversizedPictureError(f"picture {label} is too large: {error}") from error
    except Exception as error:
        raise PictureError(f"picture {label} is corrupt: {error}") from error


def _open(source: PictureSource, label: str) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, bytes):
        return _opened(io.BytesIO(source), label)
    if isinstance(source, str | Path):
        return _opened(source, label)
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim not in (2, 3) or source.size == 0:
            raise PictureError(
                f"picture {label}: an array of {source.dtype} {source.shape} was given; "
                "uint8 [H, W], [H, W, 3] or [H, W, 4] is needed"
            )
        return Image.fromarray(source)
    raise AssertionError("checked by _label")


def _opened(file: str | Path | IO[bytes], label: str) -> Image.Image:
    """Reads the header. Raises `PictureError` for a picture that declares too many pixels."""
    image = Image.open(file, formats=_formats())
    if image.width * image.height > MAX_PIXELS:
        raise OversizedPictureError(
            f"picture {label} is too large: it declares {image.width} x {image.height} pixels, at most {MAX_PIXELS} "
            "are decoded"
        )
    return image


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or (image.mode == "P" and "transparency" in image.info):
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    if image.mode == "I" or image.mode.startswith("I;16"):  # white is 65535; "I" also holds bytes
        values = np.asarray(image, dtype=np.float64)
        white = 65535.0 if image.mode != "I" or values.max() > 255 else 255.0
        return Image.fromarray((values.clip(0, white) / white * 255.0).round().astype(np.uint8)).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
