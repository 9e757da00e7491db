"""Answers on a terminal: safe text, and pictures as coloured half blocks."""

from __future__ import annotations

import re

import numpy as np
from PIL import Image

from dreamllm.documents import Document, Picture, Text

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
UPPER_HALF = "\u2580"


def printable(text: str) -> str:
    """Text without control characters, which could drive the terminal."""
    return _CONTROL.sub("\ufffd", text)


def describe(document: Document, names: list[str]) -> str:
    """A document as one text; each picture is named in brackets, in order, by `names`."""
    queue = iter(names)
    pieces = [
        printable(part.text) if isinstance(part, Text) else f"[{next(queue)}]"
        for part in document.parts
        if isinstance(part, Text | Picture)
    ]
    return " ".join(pieces)


def half_blocks(image: Image.Image, columns: int) -> str:
    """The picture in 24-bit ANSI colours, two pixels per character cell, at most `columns` characters wide.

    A smaller picture is enlarged by a whole factor up to a width of about 24.
    """
    image = image.convert("RGB")
    if image.width > columns:
        height = max(1, round(image.height * columns / image.width))
        image = image.resize((columns, height), Image.Resampling.BOX)
    else:
        factor = max(1, min(24, columns) // image.width)
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    pixels = np.asarray(image).tolist()
    lines = []
    for y in range(0, image.height, 2):
        cells = []
        for x in range(image.width):
            cell = "\033[38;2;{};{};{}m".format(*pixels[y][x])
            if y + 1 < image.height:
                cell += "\033[48;2;{};{};{}m".format(*pixels[y + 1][x])
            cells.append(cell + UPPER_HALF)
        lines.append("".join(cells) + "\033[0m")
    return "\n".join(lines)
