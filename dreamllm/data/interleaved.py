"""Interleaved documents in the MMC4 layout: JSON lines beside a folder of pictures (spec section C.4)."""

from __future__ import annotations

import json
import os
from array import array
from pathlib import Path
from typing import Any

from dreamllm.data.problems import BadSampleError
from dreamllm.data.reader import Reader
from dreamllm.documents import Document, PictureSource, interleaved
from dreamllm.documents.formats import Mode


class Interleaved(Reader):
    """One document per line: `text_list` (strings) and `image_info`, each with `image_name` and `matched_text_index`.

    `images` is the folder of the pictures (default: `images` beside the file, else the file's own folder). A picture
    that is missing or corrupt costs the document that picture only. Only the offsets of the lines are kept in memory.
    """

    def __init__(self, path: Path, images: Path | None = None, mode: Mode = "joint", name: str = "") -> None:
        if mode not in ("joint", "comprehension", "creation"):
            raise ValueError(f"mode must be 'joint', 'comprehension' or 'creation', not {mode!r}")
        self.path, self.mode = Path(path), mode
        self.name = name or self.path.stem
        beside = self.path.parent / "images"
        self.images = Path(images) if images else beside if beside.is_dir() else self.path.parent
        if not self.images.is_dir():
            raise FileNotFoundError(f"picture folder {self.images} of {self.path} does not exist")
        self._offsets = _line_offsets(self.path)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def document(self, index: int, epoch: int = 0) -> Document:
        name = f"{self.name} line {index + 1}"
        values = self._line(index, name)
        try:
            texts = [_string(text) for text in values["text_list"]]
            placed = [(int(info["matched_text_index"]), self._picture(info)) for info in values.get("image_info", [])]
            document = interleaved(texts, placed, self.mode, name)
        except (KeyError, TypeError, ValueError) as error:
            raise BadSampleError("malformed", f"{name}: {type(error).__name__}: {error}") from error
        if not document.text().strip() and not document.pictures():
            raise BadSampleError("empty_caption", f"{name} has neither text nor pictures")
        return document

    def _line(self, index: int, name: str) -> dict[str, Any]:
        start, stop = self._offsets[index], self._offsets[index + 1]
        with open(self.path, "rb") as file:
            line = os.pread(file.fileno(), stop - start, start)
        try:
            values = json.loads(line)
        except ValueError as error:
            raise BadSampleError("malformed", f"{name} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise BadSampleError("malformed", f"{name} is not a JSON object")
        return values

    def _picture(self, info: dict[str, Any]) -> PictureSource:
        return self.images / _string(info["image_name"])

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "mode": self.mode}


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"text was expected, not {value!r}")
    return value


def _line_offsets(path: Path) -> array:
    """Offsets of the beginnings of the lines and of the end; a last line without newline counts."""
    offsets = array("q", [0])
    with open(path, "rb") as file:
        for line in file:
            offsets.append(offsets[-1] + len(line))
    return offsets
