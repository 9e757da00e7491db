"""One prompt with its options, as the command line or a line of a file gives it."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dreamllm.documents import Document, PictureError
from dreamllm.documents import prompt as prompt_document
from dreamllm.inference import Assistant, Dialogue, GenerationOptions, drawing_defaults
from dreamllm.inference.drawing import Scheduler
from dreamllm.inference.options import Pictures

DRAWING = ("steps", "guidance_scale", "scheduler", "size", "candidates", "select", "negative_prompt")
"""Fields of `DrawingOptions`; None: what the model recommends."""


@dataclass(frozen=True)
class Asked:
    """A prompt and what is wanted; see `dreamllm generate --help`. `id`: the caller's own name of it."""

    prompt: str = ""
    images: Sequence[Path] = ()
    raw: bool = False
    draw: bool = False
    pictures: Pictures = "allow"
    max_new_tokens: int = 512
    max_pictures: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    scheduler: Scheduler | None = None
    size: int | None = None
    candidates: int | None = None
    select: str | None = None
    negative_prompt: str | None = None
    rewrite: bool = False
    id: str | None = None

    def changed(self, values: Mapping[str, Any], folder: Path) -> Asked:
        """With some fields from JSON; paths of pictures are relative to `folder`.

        Raises `ValueError` for an unknown field, naming those that there are, and for a value of another type.
        """
        kinds = get_type_hints(Asked)
        for name, value in values.items():
            if name not in kinds:
                raise ValueError(f"unknown key {name!r}; known: {', '.join(kinds)}")
            if not _fits(value, kinds[name]):
                raise ValueError(f"{name} must be {_described(kinds[name])}, not {value!r}")
        images = {"images": tuple(folder / image for image in values["images"])} if "images" in values else {}
        return replace(self, **{**values, **images})

    def check(self) -> None:
        """Raises `ValueError` for what needs no model to be known as wrong: an empty prompt, options that exclude each
        other, values out of range and pictures that do not exist (`PictureError`)."""
        if not self.prompt.strip() and not self.images:
            raise ValueError("the prompt is empty; give it text or a picture")
        if self.draw and (self.raw or self.images or self.pictures != "allow"):
            raise ValueError("draw takes a raw caption and no images; leave raw, images and pictures away")
        if self.rewrite and not self.draw:
            raise ValueError("rewrite words the caption that is drawn; use it with draw")
        if self.select is not None and not Path(self.select).is_dir():
            raise ValueError(f"select must be the folder of a CLIP model; {self.select} is not a folder")
        placeholders = self.prompt.count("<image>")
        if placeholders and placeholders != len(self.images):
            raise ValueError(f"{placeholders} <image> placeholders but {len(self.images)} pictures were given")
        for image in self.images:
            if not Path(image).is_file():
                raise PictureError(f"picture {image} does not exist")
        self._options(None)

    def prompt_and_options(self, assistant: Assistant) -> tuple[Document, GenerationOptions]:
        """What an engine is asked. Raises `ValueError` as `check` does, and for options that the model has not."""
        drawing = drawing_defaults(assistant.engine.model)
        drawing = drawing.changed(**{name: getattr(self, name) for name in DRAWING})
        asked = replace(self, prompt=assistant.rewritten([self.prompt])[0]) if self.rewrite else self
        return asked._document(assistant), self._options(drawing)

    def _options(self, drawing: Any) -> GenerationOptions:
        return GenerationOptions(
            max_new_tokens=0 if self.draw else self.max_new_tokens,
            max_pictures=self.max_pictures,
            pictures="force" if self.draw else self.pictures,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            drawing=drawing,
        )

    def _document(self, assistant: Assistant) -> Document:
        text = self.prompt
        if self.images and "<image>" not in text:
            text = "<image> " * len(self.images) + text
        sources = [Path(image) for image in self.images]
        if self.raw or self.draw:
            return prompt_document(text, sources)
        return Dialogue(assistant.engine.processor.template).ask(text, sources)


def asked_fields() -> tuple[str, ...]:
    return tuple(field.name for field in fields(Asked))


def _fits(value: Any, kind: Any) -> bool:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in get_args(kind))
    if origin is Literal:
        return value in get_args(kind)
    if kind == Sequence[Path]:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is type(None):
        return value is None
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _described(kind: Any) -> str:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_described(one) for one in get_args(kind))
    if origin is Literal:
        return " or ".join(repr(value) for value in get_args(kind))
    if kind == Sequence[Path]:
        return "a list of paths"
    return {str: "a text", bool: "true or false", int: "a whole number", float: "a number", type(None): "null"}[kind]
