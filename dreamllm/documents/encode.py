"""Document -> ids, labels and picture slots, in exactly the original program's layouts (spec section B)."""

from __future__ import annotations

from dataclasses import dataclass, field

from dreamllm.documents.document import Document, End, Part, Picture, Text
from dreamllm.documents.layout import IGNORE_INDEX, Encode, SequenceLayout
from dreamllm.documents.picture import PictureSource


@dataclass
class EncodedDocument:
    """One sequence.

    `input_ids` and `labels` have the same length; labels are not shifted (the label at t is the token at t, predicted
    from t - 1) and hold -100 where nothing is learned. `image_starts` are the positions of the first CLIP slot of each
    picture in `images`, `dream_starts` the positions of the first dream query of each picture in `targets`, both in
    reading order. `truncated` says whether something did not fit.
    """

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    images: list[PictureSource] = field(default_factory=list)
    targets: list[PictureSource] = field(default_factory=list)
    image_starts: list[int] = field(default_factory=list)
    dream_starts: list[int] = field(default_factory=list)
    truncated: bool = False
    name: str = ""

    def __len__(self) -> int:
        return len(self.input_ids)

    def append(self, ids: list[int], learn: bool) -> None:
        self.input_ids.extend(ids)
        self.labels.extend(ids if learn else [IGNORE_INDEX] * len(ids))


def encode_document(document: Document, layout: SequenceLayout, encode: Encode) -> EncodedDocument:
    """Encodes `document` into one sequence of at most `layout.max_length` tokens.

    `encode` turns a piece of text into ids without special tokens. Each text part is tokenised on its own.

    Raises `ValueError` for a document without parts or text, and for one that does not fit when its overflow rule is
    `"error"` or when its pictures alone exceed the context.
    """
    if not document.parts:
        raise ValueError(f"document {document.name or '(unnamed)'} has no parts")
    texts = {i: encode(part.text) for i, part in enumerate(document.parts) if isinstance(part, Text)}
    encoded = EncodedDocument(name=document.name)
    encoded.append([layout.bos], learn=document.parts[0].learn)
    fit = {"trim": _fit_trim, "stop": _fit_stop, "cut": _fit_cut, "error": _fit_whole}[document.overflow]
    fit(document, texts, layout, encoded)
    return encoded


def _length(part: Part, text_ids: list[int] | None, layout: SequenceLayout) -> int:
    if isinstance(part, Text):
        assert text_ids is not None
        return len(text_ids)
    if isinstance(part, End):
        return 1
    return part.creation * layout.dream_length + part.comprehension * layout.image_length


def _total(document: Document, texts: dict[int, list[int]], layout: SequenceLayout) -> int:
    return 1 + sum(_length(part, texts.get(i), layout) for i, part in enumerate(document.parts))


def _emit(part: Part, text_ids: list[int] | None, layout: SequenceLayout, encoded: EncodedDocument) -> None:
    if isinstance(part, Text):
        assert text_ids is not None
        encoded.append(text_ids, part.learn)
    elif isinstance(part, End):
        encoded.append([layout.eos], part.learn)
    else:
        _emit_picture(part, layout, encoded)


def _emit_picture(part: Picture, layout: SequenceLayout, encoded: EncodedDocument) -> None:
    if part.creation:
        ids = layout.dream_ids()
        encoded.append(ids[:1], part.learn)
        encoded.dream_starts.append(len(encoded))
        encoded.targets.append(part.source)
        encoded.append(ids[1:], learn=False)
    if part.comprehension:
        encoded.image_starts.append(len(encoded) + 1)
        encoded.images.append(part.source)
        encoded.append(layout.image_ids(), learn=False)


def _fit_whole(
    document: Document, texts: dict[int, list[int]], layout: SequenceLayout, encoded: EncodedDocument
) -> None:
    total = _total(document, texts, layout)
    if total > layout.max_length:
        raise ValueError(
            f"document {document.name or '(unnamed)'} needs {total} tokens, {total - layout.max_length} more than the "
            f"context of {layout.max_length}; shorten the text or use fewer pictures"
        )
    for i, part in enumerate(document.parts):
        _emit(part, texts.get(i), layout, encoded)


def _fit_trim(
    document: Document, texts: dict[int, list[int]], layout: SequenceLayout, encoded: EncodedDocument
) -> None:
    text_budget = layout.max_length - _total(document, {i: [] for i in texts}, layout)
    if text_budget < 0:
        raise ValueError(
            f"the pictures of document {document.name or '(unnamed)'} alone exceed the context of "
            f"{layout.max_length} tokens by {-text_budget}"
        )
    for i, part in enumerate(document.parts):
        if isinstance(part, Text):
            encoded.truncated |= len(texts[i]) > text_budget
            kept = texts[i][:text_budget]
            text_budget -= len(kept)
            encoded.append(kept, part.learn)
        else:
            _emit(part, None, layout, encoded)


def _fit_stop(
    document: Document, texts: dict[int, list[int]], layout: SequenceLayout, encoded: EncodedDocument
) -> None:
    end = next((part for part in document.parts if isinstance(part, End)), None)
    for i, part in enumerate(document.parts):
        if isinstance(part, End):
            break
        if len(encoded) + _length(part, texts.get(i), layout) + 1 > layout.max_length:
            encoded.truncated = True
            break
        _emit(part, texts.get(i), layout, encoded)
    if end is not None:
        encoded.append([layout.eos], end.learn)


def _fit_cut(document: Document, texts: dict[int, list[int]], layout: SequenceLayout, encoded: EncodedDocument) -> None:
    for i, part in enumerate(document.parts):
        room = layout.max_length - len(encoded)
        if _length(part, texts.get(i), layout) <= room:
            _emit(part, texts.get(i), layout, encoded)
            continue
        encoded.truncated = True
        if isinstance(part, Text):
            encoded.append(texts[i][:room], part.learn)
        return
