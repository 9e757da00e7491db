"""Conversations in LLaVA's JSON (spec section C.4)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dreamllm.data.problems import BadSampleError
from dreamllm.data.reader import Reader
from dreamllm.documents import ChatTemplate, Document, conversation

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "obj365": "assistant",
    "vg": "assistant",
}


class Conversations(Reader):
    """A JSON list of `{"image": path (optional, or a list of paths), "conversations": [{"from", "value"}, ...]}`.

    Picture paths are relative to `images` (default: the file's folder). `<image>` in a turn stands for the next picture
    as input, `<dream>` for the next picture to create. A first turn that is not the user's is dropped. `learn_dream`
    also learns the decision to create. Raises `ValueError` when the file is not such a list.
    """

    def __init__(
        self, path: Path, template: ChatTemplate, images: Path | None = None, learn_dream: bool = False, name: str = ""
    ) -> None:
        self.path, self.template, self.learn_dream = Path(path), template, learn_dream
        self.images = Path(images) if images else self.path.parent
        self.name = name or self.path.stem
        try:
            samples = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(samples, list):
            raise ValueError(f"{path} must hold a JSON list of conversations, not a {type(samples).__name__}")
        self._samples = [_kept_fields(sample) for sample in samples]

    def __len__(self) -> int:
        return len(self._samples)

    def document(self, index: int, epoch: int = 0) -> Document:
        name = f"{self.name} sample {index}"
        sample = self._samples[index]
        pictures = [self.images / picture for picture in _picture_names(sample.get("image"), name)]
        turns = _turns(sample.get("conversations"), name)
        slots = sum(text.count("<image>") + text.count("<dream>") for _, text in turns)
        if slots != len(pictures):
            raise BadSampleError(
                "picture_slots", f"{name} has {slots} <image>/<dream> placeholders but {len(pictures)} pictures"
            )
        try:
            return conversation(turns, pictures, self.template, self.learn_dream, name)
        except ValueError as error:
            raise BadSampleError("malformed", str(error)) from error

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "template": self.template.name, "learn_dream": self.learn_dream}


def _kept_fields(sample: Any) -> dict[str, Any]:
    values = sample if isinstance(sample, dict) else {}
    return {key: values[key] for key in ("image", "conversations") if key in values}


def _picture_names(value: Any, name: str) -> list[str]:
    names = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in names):
        raise BadSampleError("malformed", f'{name}: "image" must be a path or a list of paths')
    return names


def _turns(values: Any, name: str) -> list[tuple[str, str]]:
    if not isinstance(values, list):
        raise BadSampleError("malformed", f'{name} has no "conversations"')
    turns = []
    for turn in values:
        role = _ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
        if role is None or not isinstance(turn.get("value"), str):
            raise BadSampleError("malformed", f'{name}: a turn needs "from" ({", ".join(_ROLES)}) and "value" (text)')
        turns.append((role, turn["value"]))
    return turns[1:] if turns and turns[0][0] != "user" else turns
