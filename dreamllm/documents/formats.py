"""The kinds of training sample and prompt, as documents (spec sections B.2 to B.5)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal

from dreamllm.documents.document import Document, End, Part, Picture, Text
from dreamllm.documents.picture import PictureSource
from dreamllm.documents.templates import ChatTemplate, check_roles

Mode = Literal["joint", "comprehension", "creation"]
_PLACEHOLDER = re.compile(r"(<image>|<dream>)")


def pair(image: PictureSource, caption: str, mode: Literal["comprehension", "creation"], name: str = "") -> Document:
    """An image-text pair: `<s>` IMG caption `</s>` for comprehension, `<s>` caption DRM `</s>` for creation.

    Comprehension learns the caption and the end; creation learns no text at all. Raises `ValueError` for an empty
    caption.
    """
    if not caption.strip():
        raise ValueError(f"pair {name or '(unnamed)'} has an empty caption")
    if mode == "comprehension":
        return Document((Picture(image, comprehension=True), Text(caption), End()), "trim", name)
    if mode == "creation":
        picture = Picture(image, creation=True, learn=False)
        return Document((Text(caption, learn=False), picture, End(learn=False)), "trim", name)
    raise ValueError(f"mode {mode!r} is unknown for a pair; use 'comprehension' or 'creation'")


def interleaved(
    texts: Sequence[str],
    pictures: Iterable[tuple[int, PictureSource]],
    mode: Mode = "joint",
    name: str = "",
) -> Document:
    """An interleaved document: each picture follows the text it is matched with.

    `pictures` holds (index into `texts`, picture). Texts between two pictures become one chunk, joined by a space and
    tokenised together; two pictures on one text stand side by side. Mode `"joint"` both creates and reads each
    picture. Raises `ValueError` for an index outside `texts`.
    """
    return Document((*_chunks(texts, pictures, mode, name), End()), "stop", name)


def instruction_interleaved(
    instruction: str,
    texts: Sequence[str],
    pictures: Iterable[tuple[int, PictureSource]],
    template: ChatTemplate,
    mode: Mode = "joint",
    name: str = "",
) -> Document:
    """An instruction whose answer is an interleaved document; the instruction is not learned (spec B.4)."""
    prompt = Text(f"{template.opening(first=True)}{instruction}{template.closing()}", learn=False)
    return Document((prompt, *_chunks(texts, pictures, mode, name), End()), "stop", name)


def conversation(
    turns: Sequence[tuple[str, str]],
    pictures: Sequence[PictureSource],
    template: ChatTemplate,
    learn_dream: bool = False,
    name: str = "",
) -> Document:
    """A dialogue of alternating user and assistant turns; answers and their end tokens are learned (spec B.5).

    `<image>` in a turn stands for the next picture as input, `<dream>` for the next picture created and then seen.
    `learn_dream` also learns the decision to create; the original does not. Raises `ValueError` when roles do not
    alternate or the number of placeholders differs from the number of pictures.
    """
    check_roles(turns, name)
    wanted = sum(len(_PLACEHOLDER.findall(text)) for _, text in turns)
    if wanted != len(pictures):
        raise ValueError(
            f"conversation {name or '(unnamed)'} has {wanted} <image>/<dream> placeholders but {len(pictures)} pictures"
        )
    queue = iter(pictures)
    parts: list[Part] = []
    for i, (role, text) in enumerate(turns):
        if role == "user":
            rendered = f"{template.opening(first=i == 0)}{text}{template.closing()}"
            parts.extend(_expand(rendered, queue, learn=False, learn_dream=False))
        else:
            parts.extend(_expand(text, queue, learn=True, learn_dream=learn_dream))
            parts.append(End())
    return Document(tuple(parts), "cut", name)


def prompt(text: str, pictures: Sequence[PictureSource] = (), name: str = "prompt") -> Document:
    """A raw prompt, no template and no end token; `<image>` stands for the next picture.

    Raises `ValueError` when the placeholders and pictures do not match, and when encoded if it exceeds the context.
    """
    if text.count("<image>") != len(pictures):
        raise ValueError(f"{name} has {text.count('<image>')} <image> placeholders but {len(pictures)} pictures")
    parts: list[Part] = []
    queue = iter(pictures)
    for i, piece in enumerate(text.split("<image>")):
        if i:
            parts.append(Picture(next(queue), comprehension=True))
        if piece.strip(" ") or not (i or pictures):
            parts.append(Text(piece, learn=False))
    return Document(tuple(parts), "error", name)


def _expand(text: str, queue: Iterable[PictureSource], learn: bool, learn_dream: bool) -> list[Part]:
    parts: list[Part] = []
    for piece in _PLACEHOLDER.split(text):
        if piece == "<image>":
            parts.append(Picture(next(iter(queue)), comprehension=True))
        elif piece == "<dream>":
            parts.append(Picture(next(iter(queue)), comprehension=True, creation=True, learn=learn_dream))
        elif piece.strip(" "):
            parts.append(Text(piece, learn))
    return parts


def _chunks(texts: Sequence[str], pictures: Iterable[tuple[int, PictureSource]], mode: Mode, name: str) -> list[Part]:
    if mode not in ("joint", "comprehension", "creation"):
        raise ValueError(f"mode {mode!r} is unknown; use 'joint', 'comprehension' or 'creation'")
    stripped = [text.strip() for text in texts]
    parts: list[Part] = []
    done = 0
    for index, picture in sorted(pictures, key=lambda item: item[0]):
        if not 0 <= index < len(stripped):
            raise ValueError(
                f"document {name or '(unnamed)'}: a picture is matched with text {index}, "
                f"but there are only {len(stripped)} texts"
            )
        _add_chunk(parts, stripped[done : index + 1])
        done = max(done, index + 1)
        parts.append(Picture(picture, comprehension=mode != "creation", creation=mode != "comprehension"))
    _add_chunk(parts, stripped[done:])
    return parts


def _add_chunk(parts: list[Part], texts: Sequence[str]) -> None:
    chunk = " ".join(texts)
    if chunk:
        parts.append(Text(chunk))
