"""A document, or the sequence made of it, as pieces that a page can show one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from dreamllm.documents import IGNORE_INDEX, Document, EncodedDocument, End, Picture, SequenceLayout, Text


@dataclass(frozen=True)
class Segment:
    """Text, a picture that is read ("image") or created ("dream"), or the mark at the beginning or end.

    `learned`: whether the model learns to write it; of a created picture, whether it learns to announce it. `tokens`:
    its length in tokens, if known.
    """

    kind: Literal["text", "image", "dream", "begin", "end"]
    learned: bool = False
    tokens: int | None = None
    text: str = ""
    picture: Image.Image | None = None


def parts_of_document(document: Document) -> list[Segment]:
    """The document's parts. Its pictures must be decoded."""
    segments = []
    for part in document.parts:
        if isinstance(part, Text):
            segments.append(Segment("text", part.learn, text=part.text))
        elif isinstance(part, End):
            segments.append(Segment("end", part.learn))
        else:
            segments += _picture(part)
    return segments


def _picture(part: Picture) -> list[Segment]:
    assert isinstance(part.source, Image.Image)
    segments = [Segment("dream", part.learn, picture=part.source)] if part.creation else []
    return [*segments, Segment("image", picture=part.source)] if part.comprehension else segments


def parts_of_sequence(
    encoded: EncodedDocument, layout: SequenceLayout, decode: Callable[[Sequence[int]], str]
) -> list[Segment]:
    """The sequence as the model gets it: slots with their lengths, text in runs that are learned or not."""
    images = dict(zip(encoded.image_starts, encoded.images, strict=True))
    dreams = dict(zip(encoded.dream_starts, encoded.targets, strict=True))
    segments: list[Segment] = []
    position = 0
    while position < len(encoded):
        learned = encoded.labels[position] != IGNORE_INDEX
        segment = _single(encoded.input_ids[position], position, learned, layout)
        if position + 1 in images:
            segment = Segment("image", learned, layout.image_length, picture=_image(images[position + 1]))
        elif position + 1 in dreams:
            segment = Segment("dream", learned, layout.dream_length, picture=_image(dreams[position + 1]))
        if segment is None:
            stop = _run(encoded, position, layout, {start - 1 for start in (*images, *dreams)})
            ids = encoded.input_ids[position:stop]
            segment = Segment("text", learned, len(ids), decode(ids))
        segments.append(segment)
        position += segment.tokens or 1
    return segments


def _single(token: int, position: int, learned: bool, layout: SequenceLayout) -> Segment | None:
    if position == 0 and token == layout.bos:
        return Segment("begin", False, 1)  # nothing comes before it, so it cannot be learned
    return Segment("end", learned, 1) if token == layout.eos else None


def _run(encoded: EncodedDocument, start: int, layout: SequenceLayout, slots: set[int]) -> int:
    """Where a run of text that is learned, or not, ends."""
    learned = encoded.labels[start] != IGNORE_INDEX
    for position in range(start, len(encoded)):
        differs = (encoded.labels[position] != IGNORE_INDEX) != learned
        if differs or position in slots or encoded.input_ids[position] == layout.eos:
            return position
    return len(encoded)


def _image(source: object) -> Image.Image:
    assert isinstance(source, Image.Image)
    return source
