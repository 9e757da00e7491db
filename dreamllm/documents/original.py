"""The original program's sequence builder where it differs from ours: for parity tests and its checkpoints only.

`compat="original"` reaches this module. What differs (spec sections B.5, I.2; golden sequences):

- conversations: the masked part of a turn is counted by re-tokenising it, two tokens short of its length, so a
  tokenizer that drops trailing spaces leaves the colon of `ASSISTANT:` learned;
- conversations: when a picture passes the context limit, all but the first `max_length - position` ids are lost;
- instruction documents: the instruction does not reach the sequence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from dreamllm.documents.document import Document
from dreamllm.documents.encode import EncodedDocument
from dreamllm.documents.formats import Mode, interleaved
from dreamllm.documents.layout import IGNORE_INDEX, Encode, SequenceLayout
from dreamllm.documents.picture import PictureSource
from dreamllm.documents.templates import ChatTemplate

_END = "</s>"
_PLACEHOLDER = re.compile(r"(<image>|<dream>|</s>)")
_IMAGE, _DREAM = -1, -2


def instruction_interleaved(
    instruction: str,
    texts: Sequence[str],
    pictures: Iterable[tuple[int, PictureSource]],
    template: ChatTemplate,
    mode: Mode = "joint",
    name: str = "",
) -> Document:
    """The original loses `instruction` (and with it `template`): the document is the plain interleaved one."""
    del instruction, template
    return interleaved(texts, pictures, mode, name)


def encode_conversation(
    turns: Sequence[tuple[str, str]],
    pictures: Sequence[PictureSource],
    template: ChatTemplate,
    layout: SequenceLayout,
    encode: Encode,
    name: str = "",
) -> EncodedDocument:
    """Ids and labels of a dialogue exactly as the original builds them."""
    prompt = _render(turns, template)
    ids = _tokenize(prompt, layout, encode)[: layout.max_length]
    labels = _mask_turns(prompt, ids, template, layout, encode)
    return _expand(ids, labels, pictures, layout, name)


def _render(turns: Sequence[tuple[str, str]], template: ChatTemplate) -> str:
    text = f"{template.system} " if template.system else ""
    for i, (_, message) in enumerate(turns):
        text += f"{template.user_tag} {message} " if i % 2 == 0 else f"{template.assistant_tag} {message}{_END}"
    return text


def _tokenize(text: str, layout: SequenceLayout, encode: Encode) -> list[int]:
    ids = [layout.bos]
    for piece in _PLACEHOLDER.split(text):
        if piece == _END:
            ids.append(layout.eos)
        elif piece in ("<image>", "<dream>"):
            ids.append(_IMAGE if piece == "<image>" else _DREAM)
        elif piece:
            ids.extend(encode(piece))
    return ids


def _mask_turns(
    prompt: str, ids: list[int], template: ChatTemplate, layout: SequenceLayout, encode: Encode
) -> list[int]:
    labels = list(ids)
    labels[0] = IGNORE_INDEX
    position = 1
    separator = f" {template.assistant_tag} "
    for turn in prompt.split(_END):
        if not turn:
            break
        halves = turn.split(separator)
        if len(halves) != 2:
            break
        masked = len(_tokenize(halves[0] + separator, layout, encode)) - 2
        labels[position : position + masked] = [IGNORE_INDEX] * len(labels[position : position + masked])
        position += len(_tokenize(turn, layout, encode))
    return labels


def _expand(
    ids: list[int], labels: list[int], pictures: Sequence[PictureSource], layout: SequenceLayout, name: str
) -> EncodedDocument:
    encoded = EncodedDocument(name=name)
    queue = iter(pictures)
    for token, label in zip(ids, labels, strict=True):
        if token not in (_IMAGE, _DREAM):
            encoded.input_ids.append(token)
            encoded.labels.append(label)
            continue
        start = len(encoded)
        slots = (layout.dream_ids() if token == _DREAM else []) + layout.image_ids()
        if start + len(slots) > layout.max_length:
            encoded.truncated = True
            _keep_first(encoded, layout.max_length - start)
            break
        picture = next(queue)
        if token == _DREAM:
            encoded.dream_starts.append(start + 1)
            encoded.targets.append(picture)
        encoded.image_starts.append(start + len(slots) - layout.tokens_per_image - 1)
        encoded.images.append(picture)
        encoded.append(slots, learn=False)
    return encoded


def _keep_first(encoded: EncodedDocument, count: int) -> None:
    del encoded.input_ids[count:], encoded.labels[count:]
    kept = [i for i, start in enumerate(encoded.image_starts) if start <= count]
    encoded.image_starts = [encoded.image_starts[i] for i in kept]
    encoded.images = [encoded.images[i] for i in kept]
    kept = [i for i, start in enumerate(encoded.dream_starts) if start <= count]
    encoded.dream_starts = [encoded.dream_starts[i] for i in kept]
    encoded.targets = [encoded.targets[i] for i in kept]
