"""A drawn document -> an encoded sequence with its pictures decoded, or the reason why it cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, cast

from PIL import Image
from torch import Tensor

from dreamllm.data.problems import BadSampleError, Problem, Reason
from dreamllm.documents import (
    IGNORE_INDEX,
    Document,
    EncodedDocument,
    OversizedPictureError,
    PackedBatch,
    Picture,
    PictureError,
    PictureSource,
    SequenceLayout,
    load_picture,
)


class Encoder(Protocol):
    """What turns documents into batches; implemented by `DreamLLMProcessor`."""

    layout: SequenceLayout

    def encode(self, document: Document) -> EncodedDocument: ...

    def pack(
        self,
        documents: Sequence[EncodedDocument],
        with_null: bool = False,
        moments: Sequence[Tensor | None] | None = None,
        as_bytes: bool = False,
    ) -> PackedBatch: ...


Known = Callable[[int, PictureSource], Tensor | None]
"""(number of the picture to create, its source) -> its posterior moments where they are known."""


@dataclass
class Prepared:
    """An encoded document whose pictures are decoded, and what had to be changed in it.

    `moments` are those of the pictures to create, or None. A picture to create whose moments are known is left as it
    is, unless it is read too.
    """

    encoded: EncodedDocument
    problems: list[Problem]
    moments: list[Tensor | None] = field(default_factory=list)


def prepare(
    document: Document, encoder: Encoder, encoded: EncodedDocument | None = None, known: Known | None = None
) -> Prepared:
    """Encodes `document`, unless `encoded` is given, and decodes the pictures that its sequence holds.

    A document whose parts are taken while they fit (overflow "stop": interleaved) loses a picture that cannot be read
    and keeps the rest. Raises `BadSampleError` for another document with an unreadable picture, for pictures that alone
    exceed the context, and when no token and no picture is left to learn from.
    """
    name = _name(document)
    problems = [Problem(cast(Reason, reason), message) for reason, message in document.remarks]
    decoded: dict[int, Image.Image] = {}
    while True:
        encoded = encoded or _encode(document, encoder, name)
        moments, lost = _moments(encoded, known, name)
        unknown = [source for source, row in zip(encoded.targets, moments, strict=True) if row is None]
        lost |= _decode([*encoded.images, *unknown], decoded, name)
        if not lost:
            break
        problems += [Problem("lost_picture", str(error)) for error in lost.values()]
        if document.overflow != "stop":
            raise next(iter(lost.values()))
        kept = tuple(p for p in document.parts if not (isinstance(p, Picture) and id(p.source) in lost))
        document, encoded = replace(document, parts=kept), None
    _check_learns(encoded, encoder.layout, name)
    if encoded.truncated:
        problems.append(Problem("trimmed", f"{name} was cut at {encoder.layout.max_length} tokens"))
    images: list[PictureSource] = [decoded[id(source)] for source in encoded.images]
    targets: list[PictureSource] = [decoded.get(id(source), source) for source in encoded.targets]
    return Prepared(replace(encoded, images=images, targets=targets), problems, moments)


def encode_text(document: Document, encoder: Encoder) -> EncodedDocument:
    """Encodes `document` and leaves its pictures as they are. Raises `BadSampleError` as `prepare` does for texts."""
    name = _name(document)
    encoded = _encode(document, encoder, name)
    _check_learns(encoded, encoder.layout, name)
    return encoded


def _name(document: Document) -> str:
    return document.name or "(unnamed)"


def _check_learns(encoded: EncodedDocument, layout: SequenceLayout, name: str) -> None:
    if not learns(encoded, layout):
        cut = f" within {layout.max_length} tokens" if encoded.truncated else ""
        raise BadSampleError("nothing_to_learn", f"{name} has no text to learn and no picture to create{cut}")


def learns(encoded: EncodedDocument, layout: SequenceLayout) -> bool:
    """Whether a sequence trains anything besides where it ends."""
    if encoded.dream_starts:
        return True
    return any(label not in (IGNORE_INDEX, layout.eos) for label in encoded.labels[1:])


def _encode(document: Document, encoder: Encoder, name: str) -> EncodedDocument:
    try:
        return encoder.encode(document)
    except ValueError as error:
        if not document.parts:
            raise BadSampleError("nothing_to_learn", f"{name} is empty") from error
        raise BadSampleError("too_long", str(error)) from error


def _moments(
    encoded: EncodedDocument, known: Known | None, name: str
) -> tuple[list[Tensor | None], dict[int, BadSampleError]]:
    """Moments of the pictures to create, and the failures by the id of their source."""
    if known is None:
        return [None] * len(encoded.targets), {}
    failures: dict[int, BadSampleError] = {}

    def found(number: int, source: PictureSource) -> Tensor | None:
        try:
            return known(number, source)
        except PictureError as error:
            failures[id(source)] = _unreadable(source, error, name)
            return None

    return [found(number, source) for number, source in enumerate(encoded.targets)], failures


def _decode(sources: Sequence[PictureSource], decoded: dict[int, Image.Image], name: str) -> dict[int, BadSampleError]:
    """Decodes the pictures not in `decoded` yet; returns the failures by the id of their source."""
    failures: dict[int, BadSampleError] = {}
    for source in sources:
        if id(source) in decoded or id(source) in failures:
            continue
        try:
            decoded[id(source)] = load_picture(source)
        except PictureError as error:
            failures[id(source)] = _unreadable(source, error, name)
    return failures


def _unreadable(source: PictureSource, error: PictureError, name: str) -> BadSampleError:
    return BadSampleError(picture_reason(error), f"{name}: {error}")


def picture_reason(error: PictureError) -> Reason:
    """Why a picture cannot be read, as a reason to count."""
    if isinstance(error, OversizedPictureError):
        return "oversized"
    return "missing_image" if isinstance(error.__cause__, FileNotFoundError) else "corrupt_image"
