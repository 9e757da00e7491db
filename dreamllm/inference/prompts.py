"""Prompts -> ids -> embeddings: what is appended to the cache besides single tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from dreamllm.documents import Document, EncodedDocument, Text, load_picture
from dreamllm.documents.batch import check_encoded
from dreamllm.inference.options import GenerationOptions
from dreamllm.model import DreamLLM, DreamLLMProcessor
from dreamllm.model.slots import find_slots

LONE_PICTURE = GenerationOptions(max_new_tokens=0, pictures="force")


class Prompts:
    """Encodes and embeds for one model."""

    def __init__(self, model: DreamLLM, processor: DreamLLMProcessor) -> None:
        self._model, self._processor, self._layout = model, processor, model.layout

    def encode(self, prompt: Document) -> EncodedDocument:
        """Raises `ValueError` for an empty prompt and one longer than the context."""
        texts = [part.text for part in prompt.parts if isinstance(part, Text)]
        if not prompt.pictures() and not any(text.strip() for text in texts):
            raise ValueError(f"{prompt.name or 'the prompt'} is empty; give it text or a picture")
        encoded = self._processor.encode(replace(prompt, overflow="error"))
        check_encoded(encoded, self._layout)
        return encoded

    def check_room(self, encoded: EncodedDocument, options: GenerationOptions) -> None:
        """Raises `ValueError` where no answer or no forced picture fits behind the prompt."""
        needed = 1
        if options.pictures == "force":
            needed = self._layout.dream_length
            needed += self._layout.image_length + 1 if options.max_new_tokens else 0
        excess = len(encoded) + needed - self._layout.max_length
        if excess > 0:
            what = "a picture" if options.pictures == "force" else "an answer"
            raise ValueError(
                f"{encoded.name or 'the prompt'} of {len(encoded)} tokens leaves no room for {what}: shorten it by "
                f"{excess} (the context holds {self._layout.max_length} tokens)"
            )

    def for_picture(self, prompt: Document) -> EncodedDocument:
        """A prompt behind which a picture fits. Raises as `encode` and `check_room`."""
        encoded = self.encode(prompt)
        self.check_room(encoded, LONE_PICTURE)
        return encoded

    def encode_null(self, negative_prompt: str) -> EncodedDocument:
        """The empty or the negative prompt."""
        encoded = EncodedDocument(name="negative prompt" if negative_prompt else "empty prompt")
        encoded.append([self._layout.bos], learn=False)
        if negative_prompt:
            encoded.append(self._processor.encode_text(negative_prompt), learn=False)
        self.check_room(encoded, LONE_PICTURE)
        return encoded

    def embed(self, documents: Sequence[tuple[EncodedDocument, Sequence[Image.Image]]]) -> list[Tensor]:
        """Embeddings [n, H] of each document with its loaded pictures."""
        if not documents:
            return []
        ids = torch.tensor([i for document, _ in documents for i in document.input_ids], device=self._model.device)
        images = [image for _, pictures in documents for image in pictures]
        features = self._features(images) if images else None
        slots = find_slots(ids[None], self._layout, first_call=True)
        assert slots is not None
        embeds = self._model.embed(ids, slots.splice_index(len(images), queries=True), features)
        return list(embeds.split([len(document) for document, _ in documents]))

    def _features(self, images: Sequence[Image.Image]) -> Tensor:
        return self._model.encode_images(self._processor.vision(images).to(self._model.device))

    def dream_piece(self) -> Tensor:
        """`<dream_start>`, the queries and `<dream_end>`."""
        ids = torch.tensor(self._layout.dream_ids(), device=self._model.device)
        index = torch.full_like(ids, -1)
        index[1:-1] = torch.arange(self._layout.num_dream_queries, device=self._model.device)
        return self._model.embed(ids, index, None)

    def picture_pieces(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        """Embeddings of created pictures as the model reads them, with their markers."""
        ids = torch.tensor([self._layout.im_start, self._layout.im_end], device=self._model.device)
        start, end = self._model.get_input_embeddings()(ids).split(1)
        features = self._features([load_picture(picture) for picture in pictures])
        return [torch.cat([start, f.to(start.dtype), end]) for f in features]
