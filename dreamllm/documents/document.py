"""The one form in which every training sample and every prompt travels: ordered text and pictures.

Readers produce `Document`s; nothing after the reader knows where a document came from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dreamllm.documents.picture import PictureSource

Overflow = Literal["trim", "stop", "cut", "error"]


@dataclass(frozen=True)
class Text:
    """A piece of text, tokenised on its own.

    `learn`: whether its tokens contribute to the language loss.
    """

    text: str
    learn: bool = True


@dataclass(frozen=True)
class Picture:
    """A place in the sequence that holds a picture.

    `comprehension` puts the picture's CLIP features into the sequence, `creation` puts the dream queries there whose
    states condition the image decoder on this picture as the target. With both, the created copy comes first, so
    that the picture is predicted from what precedes it and later text sees the real picture. `learn`: whether
    `<dream_start>`, the decision to create, is a language label.
    """

    source: PictureSource
    comprehension: bool = False
    creation: bool = False
    learn: bool = True

    def __post_init__(self) -> None:
        if not (self.comprehension or self.creation):
            raise ValueError("a Picture must be used for comprehension, creation or both; neither was requested")


@dataclass(frozen=True)
class End:
    """The end-of-sequence token, closing a document or an assistant turn."""

    learn: bool = True


Part = Text | Picture | End


@dataclass(frozen=True)
class Document:
    """Ordered parts. The beginning-of-sequence token is implied.

    `overflow` says what happens when the parts do not fit into the model's context:

    - `"trim"`: the text is shortened so that every picture and the end token fit (image-text pairs);
    - `"stop"`: parts are taken from the front while they fit whole, then the end token (interleaved documents);
    - `"cut"`: the id sequence is cut at the limit, never inside a picture (conversations);
    - `"error"`: a `ValueError` that says by how much (prompts).

    `name` identifies the document in error messages. `remarks` are (reason, message) of what its reader left out of it,
    such as a picture that is missing.
    """

    parts: tuple[Part, ...]
    overflow: Overflow = "stop"
    name: str = ""
    remarks: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    def pictures(self) -> tuple[Picture, ...]:
        return tuple(part for part in self.parts if isinstance(part, Picture))

    def text(self) -> str:
        return " ".join(part.text for part in self.parts if isinstance(part, Text))
