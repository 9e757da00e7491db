"""Who answers: the one place where evaluation meets inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from PIL import Image

from dreamllm.documents import SPECIAL_TOKENS, ChatTemplate, Document
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
    """A DreamLLM, `batch_size` prompts at a time: greedy and sampled text by the engine, beams by `generate()`."""

    def __init__(self, assistant: Assistant, batch_size: int) -> None:
        self._engine = Engine(assistant.engine.model, assistant.engine.processor, batch_size)
        self._batch_size = batch_size

    @property
    def template(self) -> ChatTemplate:
        return self._engine.processor.template

    def answers(self, prompts: Sequence[Document], decoding: Decoding, seeds: Sequence[int]) -> list[str]:
        """Raises as `Engine.answers`."""
        if decoding.beams > 1:
            return self._beams(prompts, decoding)
        options = GenerationOptions(
            max_new_tokens=decoding.max_new_tokens,
            pictures="forbid",
            temperature=decoding.temperature,
            top_p=decoding.top_p,
        )
        return [answer.text for answer in self._engine.answers(prompts, options, seeds)]

    def pictures(self, prompts: Sequence[Document], drawing: Drawing, seeds: Sequence[int]) -> list[list[Image.Image]]:
        """The candidates of a prompt share its pass through the language model. Raises as `Engine.answers`."""
        given = {name: value for name, value in vars(drawing).items() if value is not None}
        options = replace(drawing_defaults(self._engine.model), **given)
        forced = GenerationOptions(max_new_tokens=0, pictures="force", drawing=options)
        return [answer.pictures for answer in self._engine.answers(prompts, forced, seeds)]

    def _beams(self, prompts: Sequence[Document], decoding: Decoding) -> list[str]:
        processor, model = self._engine.processor, self._engine.model
        encoded = [processor.encode(prompt) for prompt in prompts]
        if any(len(prompt.pictures()) != 1 for prompt in prompts):
            raise ValueError("beam search takes prompts with exactly one picture each")
        # Prompts of one group may write equally much, so that no answer ends where another's context does.
        groups: dict[int, list[int]] = {}
        for i, (prompt, document) in enumerate(zip(prompts, encoded, strict=True)):
            room = min(decoding.max_new_tokens, processor.layout.max_length - len(document))
            if room < 1:
                raise ValueError(
                    f"{prompt.name or 'the prompt'} of {len(document)} tokens leaves no room for an answer "
                    f"(the context holds {processor.layout.max_length} tokens)"
                )
            groups.setdefault(room, []).append(i)
        texts = [""] * len(prompts)
        vocabulary = processor.tokenizer.get_vocab()
        markers = sorted({vocabulary[t] for t in SPECIAL_TOKENS if t in vocabulary} | {processor.layout.pad})
        for room, members in groups.items():
            for start in range(0, len(members), self._batch_size):
                rows = members[start : start + self._batch_size]
                batch = processor.pad([encoded[i] for i in rows], padding_side="left")
                del batch["labels"]
                with torch.inference_mode():
                    written = model.generate(
                        **{name: tensor.to(model.device) for name, tensor in batch.items()},
                        num_beams=decoding.beams,
                        do_sample=False,
                        length_penalty=decoding.length_penalty,
                        max_new_tokens=room,
                        suppress_tokens=markers,
                        eos_token_id=processor.layout.eos,
                        pad_token_id=processor.layout.pad,
                    )
                for i, row in zip(rows, written[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                    texts[i] = processor.decode_text(row)
        return texts
