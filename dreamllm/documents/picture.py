"""Loading of pictures from the forms in which they arrive."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

PictureSource = Image.Image | np.ndarray | bytes | Path | str
"""A PIL image, an array [H, W], [H, W, 3] or [H, W, 4] of uint8, encoded bytes, or a path."""


class PictureError(ValueError):
    """A picture that is missing, truncated or not a picture. The message names it."""


def load_picture(source: PictureSource, name: str = "") -> Image.Image:
    """Returns the picture as an upright RGB image; transparency is composited on white.

    Raises `PictureError` naming the picture when it is missing, truncated, not a picture, or has no pixels.
    """
    label = name or (str(source) if isinstance(source, str | Path) else type(source).__name__)
    try:
        image = _open(source, label)
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError as error:
        raise PictureError(f"picture {label} does not exist") from error
    except UnidentifiedImageError as error:
        raise PictureError(f"picture {label} is not an image file that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise PictureError(f"picture {label} is too large: {error}") from error
    except (OSError, SyntaxError) as error:
        raise PictureError(f"picture {label} is corrupt: {error}") from error


def _open(source: PictureSource, label: str) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, bytes):
        return Image.open(io.BytesIO(source))
    if isinstance(source, str | Path):
        return Image.open(source)
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim not in (2, 3) or source.size == 0:
            raise PictureError(
                f"picture {label}: an array of {source.dtype} {source.shape} was given; "
                "uint8 [H, W], [H, W, 3] or [H, W, 4] is needed"
            )
        return Image.fromarray(source)
    raise TypeError(f"a picture must be a PIL image, array, bytes or path, not {type(source).__name__}")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or (image.mode == "P" and "transparency" in image.info):
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    if image.mode in ("I;16", "I"):
        values = np.asarray(image, dtype=np.float64)
        return Image.fromarray((values / max(values.max(), 255.0) * 255.0).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")
