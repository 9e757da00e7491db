"""What a sample of a reader's documents holds, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

from dreamllm.data import BadSampleError, Permutation, Problem, ProblemLog, Reader
from dreamllm.data.preparation import Encoder, picture_reason, prepare
from dreamllm.data.problems import Reason
from dreamllm.documents import IGNORE_INDEX, Document, Picture, PictureError, load_picture
from dreamllm.inspection.segments import Segment, parts_of_document, parts_of_sequence

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Shown:
    """A document that the page shows: its segments, and its tokens when a tokenizer is at hand."""

    name: str
    segments: list[Segment]
    problems: list[Problem]
    tokens: int | None = None
    learned: int | None = None


@dataclass
class Survey:
    """Figures of the documents that were looked at, of which `shown` are kept.

    `characters`, `pictures` and, with a tokenizer, `tokens` and `learned` hold one number per usable document: length
    of the text, pictures, tokens of the sequence, tokens that are learned. `created` counts pictures to create.
    """

    kind: str
    name: str
    documents: int
    examined: int = 0
    characters: list[int] = field(default_factory=list)
    pictures: list[int] = field(default_factory=list)
    created: int = 0
    tokens: list[int] = field(default_factory=list)
    learned: list[int] = field(default_factory=list)
    log: ProblemLog = field(default_factory=lambda: ProblemLog(max_bad_fraction=1.0))
    shown: list[Shown] = field(default_factory=list)


def survey(
    reader: Reader,
    kind: str,
    examine: int,
    samples: int,
    encoder: Encoder | None = None,
    decode: Decode | None = None,
    step: Callable[[], None] = lambda: None,
) -> Survey:
    """Looks at `examine` documents, drawn at random but always the same, and keeps the first `samples` usable ones.

    With `encoder` (and its `decode`: ids -> text) each is prepared exactly as for training. Pictures are decoded.
    `kind` is what the survey calls this kind of data (`KINDS`); `step` is called after each document.
    """
    found = Survey(kind, reader.name, len(reader))
    order = Permutation(len(reader), seed=0) if len(reader) else ()
    for i in range(min(examine, len(reader))):
        try:
            document = reader.document(order[i])
            shown, problems = _looked_at(document, encoder, decode)
        except BadSampleError as error:
            found.log.add(0, [Problem(error.reason, str(error))])
        else:
            found.log.add(1, problems)
            _count(found, document, shown)
            if len(found.shown) < samples:
                found.shown.append(shown)
        found.examined += 1
        step()
    return found


def _looked_at(document: Document, encoder: Encoder | None, decode: Decode | None) -> tuple[Shown, list[Problem]]:
    if encoder is None:
        problems = [Problem(cast(Reason, reason), message) for reason, message in document.remarks]
        return Shown(document.name, parts_of_document(_decoded(document, problems)), problems), problems
    assert decode is not None
    prepared = prepare(document, encoder)
    encoded = prepared.encoded
    learned = sum(label != IGNORE_INDEX for label in encoded.labels[1:])
    segments = parts_of_sequence(encoded, encoder.layout, decode)
    return Shown(document.name, segments, prepared.problems, len(encoded), learned), prepared.problems


def _decoded(document: Document, problems: list[Problem]) -> Document:
    """The document with its pictures decoded, without those that cannot be. Raises `BadSampleError` like `prepare`."""
    parts = []
    for part in document.parts:
        if isinstance(part, Picture):
            try:
                part = Picture(load_picture(part.source), part.comprehension, part.creation, part.learn)
            except PictureError as error:
                message = f"{document.name}: {error}"
                if document.overflow != "stop":
                    raise BadSampleError(picture_reason(error), message) from error
                problems.append(Problem("lost_picture", message))
                continue
        parts.append(part)
    return Document(tuple(parts), document.overflow, document.name)


def _count(found: Survey, document: Document, shown: Shown) -> None:
    found.characters.append(len(document.text()))
    found.pictures.append(len(document.pictures()))
    found.created += sum(picture.creation for picture in document.pictures())
    if shown.tokens is not None and shown.learned is not None:
        found.tokens.append(shown.tokens)
        found.learned.append(shown.learned)
