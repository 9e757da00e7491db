"""Events of an answer -> what OpenAI's clients read."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

from PIL import Image

from dreamllm.documents import Document, Picture, Text
from dreamllm.server.backend import PictureStep, Usage
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


def preview_of(event: PictureStep) -> dict[str, Any]:
    """DreamLLM's own: what there is of a picture that will follow."""
    image = f"data:image/png;base64,{png_base64(event.image)}"
    return {"image": image, "step": event.step, "steps": event.steps}


class Reply(Protocol):
    """The JSON of one answer, whole or in chunks; `opening` is the first of them, if there is one before the text."""

    def __init__(self, identity: str, model: str, seed: int) -> None: ...

    @property
    def opening(self) -> dict[str, Any] | None: ...

    def whole(self, content: str, reason: str, usage: Usage) -> dict[str, Any]: ...

    def chunk(self, content: str) -> dict[str, Any]: ...

    def preview(self, event: PictureStep) -> dict[str, Any]: ...

    def last(self, reason: str) -> dict[str, Any]: ...

    def usage_chunk(self, usage: Usage) -> dict[str, Any]: ...


class ChatReply:
    """The JSON of one chat completion."""

    def __init__(self, identity: str, model: str, seed: int) -> None:
        self._common = {"id": f"chatcmpl-{identity}", "created": int(time.time()), "model": model, "seed": seed}

    def whole(self, content: str, reason: str, usage: Usage) -> dict[str, Any]:
        message = {"role": "assistant", "content": content, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return {**self._common, "object": "chat.completion", "choices": [choice], "usage": chat_usage(usage)}

    @property
    def opening(self) -> dict[str, Any]:
        return self._chunk({"role": "assistant", "content": ""})

    def chunk(self, content: str) -> dict[str, Any]:
        return self._chunk({"content": content})

    def preview(self, event: PictureStep) -> dict[str, Any]:
        return self._chunk({"preview": preview_of(event)})

    def last(self, reason: str) -> dict[str, Any]:
        return self._chunk({}, reason)

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**self._common, "object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._common, "object": "chat.completion.chunk", "choices": [], "usage": chat_usage(usage)}


class CompletionReply:
    """The JSON of one continued document."""

    opening = None

    def __init__(self, identity: str, model: str, seed: int) -> None:
        self._common = {
            "id": f"cmpl-{identity}", "object": "text_completion", "created": int(time.time()), "model": model,
            "seed": seed,
        }  # fmt: skip

    def whole(self, content: str, reason: str, usage: Usage) -> dict[str, Any]:
        return {**self._of(content, reason), "usage": chat_usage(usage)}

    def chunk(self, content: str) -> dict[str, Any]:
        return self._of(content)

    def preview(self, event: PictureStep) -> dict[str, Any]:
        return self._of("", preview=preview_of(event))

    def last(self, reason: str) -> dict[str, Any]:
        return self._of("", reason)

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._common, "choices": [], "usage": chat_usage(usage)}

    def _of(self, text: str, reason: str | None = None, **more: Any) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason, **more}
        return {**self._common, "choices": [choice]}


def images_reply(pictures: Sequence[str], size: str, seed: int, usage: Usage) -> dict[str, Any]:
    """The JSON of pictures, given in base64."""
    return {
        "created": int(time.time()),
        "data": [{"b64_json": picture} for picture in pictures],
        "output_format": "png",
        "size": size,
        "seed": seed,
        "usage": _images_usage(usage),
    }


def partial_image(event: PictureStep, number: int, size: str, seed: int) -> dict[str, Any]:
    """An event of a stream of pictures: preview `number` of one of them. DreamLLM's own: `index`, `step`, `steps`."""
    own = {"partial_image_index": number, "index": event.candidate, "step": event.step, "steps": event.steps}
    return _image_event("partial_image", png_base64(event.image), size, seed) | own


def completed_image(image: Image.Image, index: int, size: str, seed: int, usage: Usage) -> dict[str, Any]:
    """An event of a stream of pictures: the last of picture `index`."""
    own = {"index": index, "usage": _images_usage(usage)}
    return _image_event("completed", png_base64(image), size, seed) | own


def _image_event(kind: str, data: str, size: str, seed: int) -> dict[str, Any]:
    return {
        "type": f"image_generation.{kind}", "b64_json": data, "created_at": int(time.time()), "size": size,
        "quality": "auto", "background": "opaque", "output_format": "png", "seed": seed,
    }  # fmt: skip


def _images_usage(usage: Usage) -> dict[str, Any]:
    details = {"text_tokens": usage.prompt_tokens, "image_tokens": 0}
    tokens = {"input_tokens": usage.prompt_tokens, "output_tokens": 0, "total_tokens": usage.prompt_tokens}
    return {**tokens, "input_tokens_details": details}
