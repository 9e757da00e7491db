"""A chat's messages -> the document that the answer continues."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from dreamllm.documents import ChatTemplate, Document, End, Part, Picture, Text
from dreamllm.server.errors import bad_request
from dreamllm.server.limits import Limits
from dreamllm.server.pictures import PictureLoader, decode_data_url, is_address
from dreamllm.server.schemas import Message, TextPart

_DRAWN = re.compile(r"(?:\n\n)?!\[[^\]\n]{0,64}\]\((data:image/[a-zA-Z0-9.+-]{1,32};base64,[A-Za-z0-9+/=]*)\)(?:\n\n)?")
"""A picture as answers carry it. Repetitions are bounded: the search takes time linear in the text."""


@dataclass(frozen=True)
class PictureUrl:
    """A picture that a message names; `param` says where."""

    url: str
    param: str


@dataclass(frozen=True)
class Turn:
    """A message: pieces of text, none beside another, and pictures."""

    role: str
    pieces: tuple[str | PictureUrl, ...]


def markdown_picture(number: int, data: str) -> str:
    """A picture inside an answer's text."""
    return f"![picture {number}](data:image/png;base64,{data})"


def read_turns(messages: Sequence[Message], limits: Limits) -> tuple[str | None, list[Turn]]:
    """The system's text, if any, and the turns. Raises `ApiError` for roles, sizes and pictures out of place."""
    system: str | None = None
    turns: list[Turn] = []
    for i, message in enumerate(messages):
        turn = Turn(message.role, _pieces(message, f"messages[{i}].content"))
        if message.role in ("system", "developer"):
            if i:
                raise bad_request("only the first message may be the system's", f"messages[{i}].role")
            system = _only_text(turn, i)
            continue
        expected = ("user", "assistant")[len(turns) % 2]
        if message.role != expected:
            raise bad_request(
                f"messages must alternate user, assistant, user, ...; number {i} is {message.role!r}, not {expected!r}",
                f"messages[{i}].role",
            )
        turns.append(turn)
    _check(system, turns, limits)
    return system, turns


def chat_document(
    system: str | None, turns: Sequence[Turn], pictures: Mapping[PictureUrl, Image.Image], template: ChatTemplate
) -> Document:
    """The turns in the model's template, which a system message changes; awaits the assistant's answer.

    What looks like a marker in a message's text stays text.
    """
    if system is not None:
        template = replace(template, system=system)
    parts: list[Part] = []
    for number, turn in enumerate(turns):
        if turn.role == "user":
            pieces = _joined((template.opening(first=number == 0), *turn.pieces, template.closing()))
        else:
            pieces = list(turn.pieces)
        for piece in pieces:
            if isinstance(piece, PictureUrl):
                parts.append(Picture(pictures[piece], comprehension=True, creation=turn.role == "assistant"))
            elif piece.strip(" "):
                parts.append(Text(piece, learn=False))
        if turn.role == "assistant":
            parts.append(End())
    return Document(tuple(parts), "error", "the prompt")


def raw_document(pieces: Sequence[str | PictureUrl], pictures: Mapping[PictureUrl, Image.Image]) -> Document:
    """Text and pictures that the model has read, as they stand; awaits what follows."""
    parts = [
        Picture(pictures[piece], comprehension=True) if isinstance(piece, PictureUrl) else Text(piece, learn=False)
        for piece in pieces
    ]
    return Document(tuple(parts), "error", "the prompt")


def load_pictures(
    wanted: Sequence[PictureUrl], fetched: Mapping[str, bytes], limits: Limits
) -> dict[PictureUrl, Image.Image]:
    """Decodes pictures. Raises `ApiError` for one that is not a picture or too much."""
    loader = PictureLoader(limits)
    return {
        picture: loader.load(
            fetched[picture.url] if is_address(picture.url) else decode_data_url(picture.url, picture.param, limits),
            picture.param,
        )
        for picture in wanted
    }


def pictures_of(turns: Sequence[Turn]) -> list[PictureUrl]:
    return [piece for turn in turns for piece in turn.pieces if isinstance(piece, PictureUrl)]


def _pieces(message: Message, param: str) -> tuple[str | PictureUrl, ...]:
    if isinstance(message.content, str):
        if message.role == "assistant":
            return tuple(split_pictures(message.content, param))
        return (message.content,)
    pieces: list[str | PictureUrl] = []
    for i, part in enumerate(message.content):
        where = f"{param}[{i}]"
        if not isinstance(part, TextPart):
            pieces.append(PictureUrl(part.image_url.url, f"{where}.image_url.url"))
        elif message.role == "assistant":
            pieces += split_pictures(part.text, where)
        elif pieces and isinstance(pieces[-1], str):
            pieces[-1] += f"\n{part.text}"
        else:
            pieces.append(part.text)
    return tuple(pieces)


def split_pictures(text: str, param: str) -> list[str | PictureUrl]:
    """Text with pictures in it, as answers have them."""
    pieces: list[str | PictureUrl] = []
    for i, piece in enumerate(_DRAWN.split(text)):
        if i % 2:
            pieces.append(PictureUrl(piece, f"{param}, picture {i // 2 + 1}"))
        elif piece:
            pieces.append(piece)
    return pieces


def _joined(pieces: Sequence[str | PictureUrl]) -> list[str | PictureUrl]:
    joined: list[str | PictureUrl] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if isinstance(piece, str) and isinstance(last, str):
            joined[-1] = last + piece
        else:
            joined.append(piece)
    return joined


def _only_text(turn: Turn, number: int) -> str:
    text = "\n".join(piece for piece in turn.pieces if isinstance(piece, str))
    if len(turn.pieces) > 1 or not text:
        raise bad_request("a system message holds text only", f"messages[{number}].content")
    return text


def _check(system: str | None, turns: Sequence[Turn], limits: Limits) -> None:
    if not turns or turns[-1].role != "user":
        raise bad_request("the last message must be the user's", "messages")
    if not any(isinstance(piece, PictureUrl) or piece.strip() for piece in turns[-1].pieces):
        raise bad_request("the last message is empty; give it text or a picture", "messages")
    check_pieces([system or "", *(piece for turn in turns for piece in turn.pieces)], "messages", limits)


def check_pieces(pieces: Sequence[str | PictureUrl], param: str, limits: Limits) -> None:
    """Raises `ApiError` for more text or pictures than the limits allow."""
    check_text([piece for piece in pieces if isinstance(piece, str)], param, limits)
    count = sum(isinstance(piece, PictureUrl) for piece in pieces)
    if count > limits.max_pictures_in:
        raise bad_request(f"{count} pictures were given, at most {limits.max_pictures_in} are taken", param)


def check_text(texts: Sequence[str], param: str, limits: Limits) -> None:
    """Raises `ApiError` for more characters than any context could hold, before they are tokenised."""
    characters = sum(len(text) for text in texts)
    if characters > limits.max_text_characters:
        raise bad_request(
            f"the text has {characters} characters, at most {limits.max_text_characters} are taken",
            param,
            "context_length_exceeded",
        )
