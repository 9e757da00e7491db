"""Pictures on a terminal, by what it understands: the protocols of kitty and iTerm2, sixels, or coloured half blocks.

Protocols: https://sw.kovidgoyal.net/kitty/graphics-protocol, https://iterm2.com/documentation-images.html, DEC STD 070
(sixel), ECMA-48 (device attributes).
"""

from __future__ import annotations

import base64
import io
import os
import re
import select
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from shutil import get_terminal_size
from typing import Literal, TextIO

import numpy as np
from PIL import Image

try:
    import fcntl
    import struct
    import termios
    import tty
except ImportError:  # no Unix: nothing can be asked
    termios = None  # type: ignore[assignment]

from dreamllm.inference.terminal import half_blocks

Way = Literal["kitty", "iterm2", "sixel", "blocks", "none"]

TINY, TINY_SHOWN = 64, 192
"""Pictures whose longer side has at most so many pixels are enlarged by a whole factor to about so many."""
ANSWER_SECONDS = 0.5
"""A terminal answers at once; one behind a slow line may take so long."""
_USUAL_CELL = 8  # pixels wide, where the terminal does not say
_KITTY_CHUNK = 4096
_QUERY_NUMBER = 4711
_QUERY = f"\033_Gi={_QUERY_NUMBER},s=1,v=1,a=q,t=d,f=24;AAAA\033\\\033[c".encode()
"""Can you show kitty's pictures, and what are you? Every terminal answers the second, so its answer ends the wait."""
_ATTRIBUTES = re.compile(rb"\033\[\?([\d;]*)c")
_SIXEL = b"4"
_COLOURS = 255


def way_of(source: TextIO, target: TextIO, environment: Mapping[str, str]) -> Way:
    """How pictures can be shown where `target` is written and `source` typed; "none" where it is no terminal."""
    if not target.isatty():
        return "none"
    inside_another = "TMUX" in environment or environment.get("TERM", "").startswith(("screen", "tmux"))
    if environment.get("TERM_PROGRAM") == "iTerm.app" and not inside_another:
        return "iterm2"
    answer = ask(source.fileno(), target.fileno()) if source.isatty() and environment.get("TERM") != "dumb" else b""
    if f"\033_Gi={_QUERY_NUMBER};OK".encode() in answer:
        return "kitty"
    attributes = _ATTRIBUTES.search(answer)
    if attributes and _SIXEL in attributes[1].split(b";"):
        return "sixel"
    coloured = environment.get("COLORTERM") in ("truecolor", "24bit") or environment.get("TERM", "").endswith("-direct")
    return "blocks" if coloured else "none"


def ask(source: int, target: int, seconds: float = ANSWER_SECONDS) -> bytes:
    """What the terminal behind two file descriptors answers about itself; what it does not say in time is left out."""
    if termios is None:
        return b""
    before = termios.tcgetattr(source)
    answer = b""
    try:
        tty.setcbreak(source, termios.TCSANOW)  # the answer must neither be echoed nor wait for a line's end
        os.write(target, _QUERY)
        deadline = time.monotonic() + seconds
        while not _ATTRIBUTES.search(answer):
            ready, _, _ = select.select([source], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            answer += os.read(source, 1024)
    finally:
        termios.tcsetattr(source, termios.TCSANOW, before)
    return answer


def encode(image: Image.Image, way: Way, columns: int, cell_width: float = _USUAL_CELL) -> str:
    """What shows the picture in at most so many columns; nothing for "none"."""
    if way == "none":
        return ""
    if way == "blocks":
        return half_blocks(image, columns) + "\n"
    fitted = fit(image.convert("RGB"), max(1, int(columns * cell_width)))
    return _ENCODERS[way](fitted) + "\n"


def show(image: Image.Image, way: Way, target: TextIO) -> None:
    """Writes the picture to a terminal."""
    columns = max(1, get_terminal_size().columns - 2)
    target.write(encode(image, way, columns, cell_width(target)))
    target.flush()


def cell_width(target: TextIO) -> float:
    """Pixels of a character's width, as the terminal says it."""
    with suppress(OSError):  # of what is no terminal
        if termios is not None:
            _, columns, width, _ = struct.unpack("4H", fcntl.ioctl(target.fileno(), termios.TIOCGWINSZ, b"\0" * 8))
            return width / columns if columns and width else _USUAL_CELL
    return _USUAL_CELL


def fit(image: Image.Image, most: int) -> Image.Image:
    """At most so many pixels wide; a tiny picture is enlarged with hard edges."""
    longest = max(image.size)
    if longest <= TINY:
        factor = max(1, min(round(TINY_SHOWN / longest), most // image.width))
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if image.width <= most:
        return image
    return image.resize((most, max(1, round(image.height * most / image.width))), Image.Resampling.LANCZOS)


def kitty(image: Image.Image) -> str:
    data = _png(image)
    chunks = [data[i : i + _KITTY_CHUNK] for i in range(0, len(data), _KITTY_CHUNK)]
    pieces = []
    for i, chunk in enumerate(chunks):
        control = "a=T,f=100,q=2," if i == 0 else ""  # show a PNG, and do not answer
        pieces.append(f"\033_G{control}m={int(i + 1 < len(chunks))};{chunk}\033\\")
    return "".join(pieces)


def iterm2(image: Image.Image) -> str:
    data = _png(image)
    return f"\033]1337;File=inline=1;size={len(base64.b64decode(data))};width=auto;preserveAspectRatio=1:{data}\a"


def sixel(image: Image.Image) -> str:
    """The picture in up to 255 colours of its own."""
    reduced = image.quantize(_COLOURS, dither=Image.Dither.FLOYDSTEINBERG)
    indices = np.asarray(reduced)
    palette = np.asarray(reduced.getpalette()).reshape(-1, 3)
    used = np.unique(indices)
    pieces = [f'\033P0;1q"1;1;{image.width};{image.height}']
    for colour in used:
        red, green, blue = (round(int(value) * 100 / 255) for value in palette[colour])
        pieces.append(f"#{colour};2;{red};{green};{blue}")
    for top in range(0, image.height, 6):
        band = indices[top : top + 6]
        weights = (1 << np.arange(len(band)))[:, None]
        rows = [f"#{colour}{_runs(((band == colour) * weights).sum(0))}" for colour in np.unique(band)]
        pieces.append("$".join(rows) + "-")  # every colour begins at the left again; then the next six lines
    return "".join(pieces) + "\033\\"


def _runs(bits: np.ndarray) -> str:
    """Sixels of one colour: each column's bits as a character, repetitions as !count."""
    ends = np.flatnonzero(np.diff(bits, append=-1)) + 1
    pieces = []
    start = 0
    for end in ends.tolist():
        letter, count = chr(63 + int(bits[start])), end - start
        pieces.append(f"!{count}{letter}" if count > 3 else letter * count)
        start = end
    return "".join(pieces)


_ENCODERS: dict[str, Callable[[Image.Image], str]] = {"kitty": kitty, "iterm2": iterm2, "sixel": sixel}


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
