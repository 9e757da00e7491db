"""The samples behind an evaluation of a digits model, for a report to show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dreamllm.documents import Document, Picture, Text
from dreamllm.training import write_file

_ARRAYS = ("pictures", "labels", "created", "wanted", "judged", "attention_pictures", "attention_maps")


@dataclass(frozen=True)
class DigitsSamples:
    """Pictures are uint8, 0 background to 255 ink.

    `pictures` [N, 8, 8], `labels` [N], `captions`: unseen scans and what the model wrote about each. `created`
    [M, h, w], `wanted` [M], `judged` [M]: drawn digits, the caption's number and the judge's opinion.
    `instructions`, `documents`: requests and the documents that answered them. `attention_pictures` [10, h, w],
    `attention_maps` float32 [10, Q, h, w]: one drawn digit per number and where each dream query acted in it.
    """

    pictures: np.ndarray
    labels: np.ndarray
    captions: Sequence[str]
    created: np.ndarray
    wanted: np.ndarray
    judged: np.ndarray
    instructions: Sequence[str]
    documents: Sequence[Document]
    attention_pictures: np.ndarray
    attention_maps: np.ndarray

    def save(self, path: Path) -> None:
        """Writes one `.npz` file, complete or not at all."""
        drawn: list[np.ndarray] = []
        texts = {
            "captions": list(self.captions),
            "instructions": list(self.instructions),
            "documents": [_to_json(document, drawn) for document in self.documents],
        }
        arrays: dict[str, Any] = {name: getattr(self, name) for name in _ARRAYS}
        arrays |= {f"document_picture_{i}": picture for i, picture in enumerate(drawn)}
        arrays["texts"] = np.array(json.dumps(texts))
        write_file(path, lambda file: np.savez_compressed(file, **arrays))

    @staticmethod
    def load(path: Path) -> DigitsSamples:
        """Reads what `save` wrote. Nothing is unpickled."""
        with np.load(path, allow_pickle=False) as arrays:
            texts = json.loads(str(arrays["texts"]))
            documents = [_from_json(parts, arrays) for parts in texts["documents"]]
            return DigitsSamples(
                **{name: arrays[name] for name in _ARRAYS},
                captions=texts["captions"],
                instructions=texts["instructions"],
                documents=documents,
            )


def to_uint8(pictures: Sequence[Image.Image]) -> np.ndarray:
    """Grey pictures of one size -> uint8 [N, H, W]."""
    return np.stack([np.asarray(picture.convert("L")) for picture in pictures])


def _to_json(document: Document, drawn: list[np.ndarray]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for part in document.parts:
        if isinstance(part, Text):
            parts.append({"text": part.text})
        elif isinstance(part, Picture):
            parts.append({"picture": len(drawn)})
            drawn.append(np.asarray(part.source))
    return parts


def _from_json(parts: list[dict[str, Any]], arrays: Any) -> Document:
    return Document(
        tuple(
            Text(part["text"])
            if "text" in part
            else Picture(arrays[f"document_picture_{part['picture']}"], comprehension=True, creation=True)
            for part in parts
        )
    )
