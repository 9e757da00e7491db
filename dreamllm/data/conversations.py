"""Conversations in LLaVA's JSON, its old and its new form (spec section C.4)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dreamllm.data.filters import Filters, Screen
from dreamllm.data.pairs import valid_text
from dreamllm.data.problems import BadSampleError
from dreamllm.data.reader import Reader
from dreamllm.data.records import JsonRecords
from dreamllm.documents import ChatTemplate, Document, conversation

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "obj365": "assistant",
    "vg": "assistant",
}
_SLOTS = {"image": "<image>", "dream": "<dream>"}
"""Modal type of the new form -> the placeholder of the old one."""


class Conversations(Reader):
    """A JSON list (or JSON lines) of `{"image": ..., "conversations": [{"from", "value"}, ...]}`.

    Old form: `image` is a path or a list of paths, and is left out when there is none. `<image>` in a turn stands for
    the next picture as input, `<dream>` for the next picture to create. New form: no `image`; a turn may have
    `modal_info`, `{placeholder: [modal type, [paths]]}`, where each occurrence of the placeholder in the turn's text
    stands for the next of the paths. The type "image" is a picture as input, or one to create when the placeholder is
    `<dream>`; the type "dream" is one to create.

    Paths are relative to `images` (default: the file's folder). A first turn that is not the user's is dropped, with
    its pictures in the new form. `learn_dream` also learns the decision to create. Samples are read when they are asked
    for. Raises `ValueError` when the file is not such a list.
    """

    def __init__(
        self,
        path: Path,
        template: ChatTemplate,
        images: Path | None = None,
        learn_dream: bool = False,
        name: str = "",
        filters: Filters | None = None,
    ) -> None:
        self.path, self.template, self.learn_dream = Path(path), template, learn_dream
        self.images = Path(images) if images else self.path.parent
        self.name = name or self.path.stem
        self.filters = filters or Filters()
        self._screen = Screen(self.filters)
        self._records = JsonRecords([self.path])

    def __len__(self) -> int:
        return len(self._records)

    def document(self, index: int, epoch: int = 0) -> Document:
        sample, name = self._records.record(index)
        if not isinstance(sample, dict):
            raise BadSampleError("malformed", f"{name} is not a JSON object")
        turns, names = _turns_and_pictures(sample, name)
        slots = sum(text.count("<image>") + text.count("<dream>") for _, text in turns)
        if slots != len(names):
            raise BadSampleError(
                "picture_slots", f"{name} has {slots} <image>/<dream> placeholders but {len(names)} pictures"
            )
        pictures = [self.images / picture for picture in names]
        self._check(sample, turns, pictures, name)
        try:
            return conversation(turns, pictures, self.template, self.learn_dream, name)
        except ValueError as error:
            raise BadSampleError("malformed", str(error)) from error

    def _check(
        self, sample: dict[str, Any], turns: Sequence[tuple[str, str]], pictures: Sequence[Path], name: str
    ) -> None:
        self._screen.check_text("\n".join(text for _, text in turns), name)
        self._screen.check_metadata(sample, name)
        self._screen.check_listed([name, *(key for key in [sample.get("id")] if isinstance(key, str))], name)
        self._screen.check_count(len(pictures), name)
        for picture in pictures:
            self._screen.check_picture(picture, f"{name}, picture {picture.name}")

    def describe(self) -> dict[str, Any]:
        values = {**super().describe(), "template": self.template.name, "learn_dream": self.learn_dream}
        if filters := self.filters.describe():
            values["filters"] = filters
        return values


def _turns_and_pictures(sample: dict[str, Any], name: str) -> tuple[list[tuple[str, str]], list[str]]:
    """The turns with placeholders of the old form, and the paths of the pictures in their order."""
    values = sample.get("conversations")
    if not isinstance(values, list):
        raise BadSampleError("malformed", f'{name} has no "conversations"')
    old_form = sample.get("image") is not None
    turns: list[tuple[str, str]] = []
    names = _paths(sample.get("image"), name) if old_form else []
    for turn in values:
        role = _ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
        if role is None or not isinstance(turn.get("value"), str):
            raise BadSampleError("malformed", f'{name}: a turn needs "from" ({", ".join(_ROLES)}) and "value" (text)')
        if not turns and role != "user" and turn is values[0]:
            continue
        text: str = turn["value"]
        own: list[str] = []
        if turn.get("modal_info"):
            if old_form:
                raise BadSampleError("malformed", f'{name} has both "image" and "modal_info"')
            text, own = _new_form(text, turn["modal_info"], name)
        turns.append((role, valid_text(text, name)))
        names += own
    return turns, names


def _new_form(text: str, modal_info: Any, name: str) -> tuple[str, list[str]]:
    """The text with placeholders of the old form, and the paths in the order of the placeholders."""
    queues: dict[str, list[str]] = {}
    slots: dict[str, str] = {}
    if not isinstance(modal_info, dict):
        raise BadSampleError("malformed", f'{name}: "modal_info" must be {{placeholder: [type, [paths]]}}')
    for placeholder, info in modal_info.items():
        if not (placeholder and isinstance(info, list) and len(info) == 2 and isinstance(info[0], str)):
            raise BadSampleError("malformed", f'{name}: "modal_info" of {placeholder!r} must be [type, [paths]]')
        if info[0] not in _SLOTS:
            raise BadSampleError(
                "malformed", f"{name}: modal type {info[0]!r} is not supported ({', '.join(map(repr, _SLOTS))})"
            )
        queues[placeholder] = _paths(info[1], name)
        slots[placeholder] = "<dream>" if placeholder == "<dream>" else _SLOTS[info[0]]
    longest_first = sorted(queues, key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
    names = []
    for i, piece in enumerate(pieces):
        if i % 2:
            if not queues[piece]:
                raise BadSampleError("picture_slots", f"{name} has more {piece} than pictures for it")
            names.append(queues[piece].pop(0))
            pieces[i] = slots[piece]
    left = sum(map(len, queues.values()))
    if left:
        raise BadSampleError("picture_slots", f'{name} has {left} pictures in "modal_info" without a place in the text')
    return "".join(pieces), names


def _paths(value: Any, name: str) -> list[str]:
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) and item for item in names):
        raise BadSampleError("malformed", f"{name}: a picture must be a path, or a list of paths")
    return list(names)
