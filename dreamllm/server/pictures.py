"""Pictures on the wire: data URLs in, within limits, and PNG out."""

from __future__ import annotations

import base64
import binascii
import io
import re

from PIL import Image

from dreamllm.documents import PictureError, load_picture
from dreamllm.server.errors import ApiError, bad_request
from dreamllm.server.limits import Limits

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
"""What clients may send."""

_DATA_URL = re.compile(r"data:image/[a-zA-Z0-9.+-]{1,32};base64,")
_SHOWN = 40


class PictureLoader:
    """Decodes the pictures of one request, of which only their header is read before their size is known."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._pixels_left = limits.max_picture_pixels

    def load(self, data: bytes, param: str) -> Image.Image:
        """The picture in upright RGB. Raises `ApiError` naming `param` for one that is not, or is too much."""
        self._check_header(data, param)
        try:
            return load_picture(data, "data")
        except PictureError as error:
            raise bad_request(str(error), param, "invalid_image") from None

    def _check_header(self, data: bytes, param: str) -> None:
        limits = self._limits
        if len(data) > limits.max_picture_bytes:
            message = f"a picture has {len(data)} bytes, at most {limits.max_picture_bytes} are taken"
            raise bad_request(message, param, "image_too_large")
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                # MPO, what some telephones take: a JPEG with further pictures behind the first.
                animated = image.format != "MPO" and getattr(image, "is_animated", False)
        except Image.DecompressionBombError:  # its header declares more than Pillow goes on with
            raise self._too_many("this one", param) from None
        except Exception:  # whatever Pillow makes of hostile bytes
            message = f"a picture is not one, or not one of {', '.join(FORMATS)}"
            raise bad_request(message, param, "invalid_image") from None
        if min(width, height) < 1 or max(width, height) > limits.max_picture_ratio * min(width, height):
            raise bad_request(
                f"a picture of {width} x {height} pixels was given; the longer side may be at most "
                f"{limits.max_picture_ratio} times the shorter",
                param,
                "image_too_large",
            )
        self._pixels_left -= width * height
        if self._pixels_left < 0:
            raise self._too_many(f"the one of {width} x {height}", param)
        if animated:
            raise bad_request("a picture is animated; send one of its frames", param, "invalid_image")

    def _too_many(self, which: str, param: str) -> ApiError:
        most = self._limits.max_picture_pixels
        message = f"the pictures have too many pixels: with {which} more than {most} together; scale them down"
        return bad_request(message, param, "image_too_large")


def is_address(url: str) -> bool:
    """Whether a picture would have to be fetched."""
    return url[:8].lower().startswith(("http://", "https://"))


def decode_data_url(url: str, param: str, limits: Limits) -> bytes:
    """The bytes of `data:image/...;base64,...`. Raises `ApiError` naming `param` for anything else."""
    match = _DATA_URL.match(url)
    if match is None:
        shown = url[:_SHOWN] + ("..." if len(url) > _SHOWN else "")
        raise bad_request(
            f"pictures are given as data:image/png;base64,... (or jpeg, webp, gif, bmp), not as {shown!r}",
            param,
            "invalid_image_url",
        )
    encoded = len(url) - match.end()
    if encoded > limits.max_picture_bytes * 4 // 3 + 4:
        raise bad_request(
            f"a picture has about {encoded * 3 // 4} bytes, at most {limits.max_picture_bytes} are taken",
            param,
            "image_too_large",
        )
    try:
        return base64.b64decode(url[match.end() :].encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise bad_request("a picture's base64 is malformed", param, "invalid_base64") from None


def png_base64(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
