"""Events of an answer -> what OpenAI's clients read."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from dreamllm.server.backend import Event, Finished, PictureDrawn, TextPiece, Usage
from dreamllm.server.pictures import png_base64
from dreamllm.server.prompts import markdown_picture

_REASONS = {"end": "stop", "stop": "stop", "length": "length", "context": "length", "cancelled": "stop"}


class StopFilter:
    """Passes text on up to the first of the stop strings, holding back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """What can be shown now."""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """What was held back, where no more text follows it."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop` without completing it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class Composer:
    """The content of an answer as one text, piece by piece; pictures stand in it as Markdown with data URLs."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._filter = StopFilter(stops)
        self._pictures = 0
        self._empty = True
        self._after_picture = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the answer: what comes after it is not shown."""
        return self._filter.stopped

    def feed(self, event: Event) -> str:
        """What an event adds to the content."""
        if self.stopped:
            return ""
        if isinstance(event, TextPiece):
            return self._text(self._filter.feed(event.text))
        if isinstance(event, PictureDrawn):
            before = self._text(self._filter.flush())
            self._pictures += 1
            gap = "" if self._empty else "\n\n"
            self._empty, self._after_picture = False, True
            return f"{before}{gap}{markdown_picture(self._pictures, png_base64(event.image))}"
        if isinstance(event, Finished):
            return self._text(self._filter.flush())
        return ""

    def _text(self, text: str) -> str:
        if not text:
            return ""
        gap = "\n\n" if self._after_picture else ""
        self._empty, self._after_picture = False, False
        return gap + text


def finish_reason(finished: Finished, composer: Composer) -> str:
    return "stop" if composer.stopped else _REASONS[finished.reason]


def chat_usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


class ChatReply:
    """The JSON of one chat completion, whole or in chunks."""

    def __init__(self, identity: str, model: str, seed: int) -> None:
        self._common = {"id": f"chatcmpl-{identity}", "created": int(time.time()), "model": model, "seed": seed}

    def whole(self, content: str, reason: str, usage: Usage) -> dict[str, Any]:
        message = {"role": "assistant", "content": content, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return {**self._common, "object": "chat.completion", "choices": [choice], "usage": chat_usage(usage)}

    def chunk(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**self._common, "object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._common, "object": "chat.completion.chunk", "choices": [], "usage": chat_usage(usage)}


def images_reply(pictures: Sequence[str], size: str, seed: int, usage: Usage) -> dict[str, Any]:
    """The JSON of pictures, given in base64."""
    details = {"text_tokens": usage.prompt_tokens, "image_tokens": 0}
    tokens = {"input_tokens": usage.prompt_tokens, "output_tokens": 0, "total_tokens": usage.prompt_tokens}
    return {
        "created": int(time.time()),
        "data": [{"b64_json": picture} for picture in pictures],
        "output_format": "png",
        "size": size,
        "seed": seed,
        "usage": {**tokens, "input_tokens_details": details},
    }
