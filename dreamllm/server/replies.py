"""Events of an answer -> what OpenAI's clients read."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from PIL import Image

from dreamllm.documents import Document, Picture, Text
from dreamllm.server.backend import Usage
from dreamllm.server.pictures import png_base64
from dreamllm.server.prompts import markdown_picture

FINISH_REASONS = {"end": "stop", "stop": "stop", "length": "length", "context": "length", "cancelled": "length"}
"""OpenAI's names of why an answer ended."""


class Composer:
    """The content of an answer as one text, piece by piece; pictures stand in it as Markdown with data URLs."""

    def __init__(self) -> None:
        self._pictures = 0
        self._empty = True
        self._after_picture = False

    def text(self, text: str) -> str:
        """What a piece of text adds to the content."""
        if not text:
            return ""
        gap = "\n\n" if self._after_picture else ""
        self._empty, self._after_picture = False, False
        return gap + text

    def picture(self, image: Image.Image) -> str:
        """What a picture adds to the content."""
        gap = "" if self._empty else "\n\n"
        self._empty, self._after_picture = False, True
        self._pictures += 1
        return gap + markdown_picture(self._pictures, png_base64(image))


def content_of(document: Document) -> str:
    """The content of a whole answer."""
    composer = Composer()
    content = ""
    for part in document.parts:
        if isinstance(part, Text):
            content += composer.text(part.text)
        elif isinstance(part, Picture) and isinstance(part.source, Image.Image):
            content += composer.picture(part.source)
    return content


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
