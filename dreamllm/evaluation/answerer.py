"""Who answers: the one place where evaluation meets inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from PIL import Image

from dreamllm.documents import ChatTemplate, Document
from dreamllm.evaluation.benchmarks.base import Decoding, Drawing
from dreamllm.inference import Assistant, Engine, GenerationOptions, drawing_defaults


class Answerer(Protocol):
    """A model as the benchmarks see it. What it gives for a prompt depends neither on the others nor on the batch."""

    @property
    def template(self) -> ChatTemplate:
        """The model's own chat template."""

    def answers(self, prompts: Sequence[Document], decoding: Decoding, seeds: Sequence[int]) -> list[str]:
        """The text written after each prompt, without pictures."""

    def pictures(self, prompts: Sequence[Document], drawing: Drawing, seeds: Sequence[int]) -> list[list[Image.Image]]:
        """`drawing.candidates` pictures for each prompt."""


class ModelAnswerer:
    """A DreamLLM, `batch_size` prompts at a time."""

    def __init__(self, assistant: Assistant, batch_size: int) -> None:
        self._engine = Engine(assistant.engine.model, assistant.engine.processor, batch_size)

    @property
    def template(self) -> ChatTemplate:
        return self._engine.processor.template

    def answers(self, prompts: Sequence[Document], decoding: Decoding, seeds: Sequence[int]) -> list[str]:
        """Raises as `Engine.answers`, and `ValueError` for a decoding that contradicts itself."""
        options = GenerationOptions(
            max_new_tokens=decoding.max_new_tokens,
            pictures="forbid",
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            top_k=decoding.top_k,
            num_beams=decoding.beams,
            length_penalty=decoding.length_penalty,
        )
        return [answer.text for answer in self._engine.answers(prompts, options, seeds)]

    def pictures(self, prompts: Sequence[Document], drawing: Drawing, seeds: Sequence[int]) -> list[list[Image.Image]]:
        """The candidates of a prompt share its pass through the language model. Raises as `Engine.answers`."""
        given = {name: value for name, value in vars(drawing).items() if value is not None}
        options = replace(drawing_defaults(self._engine.model), **given)
        forced = GenerationOptions(max_new_tokens=0, pictures="force", drawing=options)
        return [answer.pictures for answer in self._engine.answers(prompts, forced, seeds)]
