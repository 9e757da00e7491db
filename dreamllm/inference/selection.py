"""Agreement of pictures with texts by a CLIP model, and the choice among candidates (spec G.3)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

from dreamllm.documents import load_picture

try:  # the name since the Pillow and torchvision back ends were separated; before, this was the only class
    from transformers import CLIPImageProcessorPil
except ImportError:
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil


class ClipJudge:
    """A CLIP model from a local folder. Texts longer than its context are cut, as its published users do."""

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu") -> None:
        if not (Path(folder) / "config.json").is_file():
            raise FileNotFoundError(f"{folder} is not a folder with a CLIP model: it has no config.json")
        self._model: Any = CLIPModel.from_pretrained(folder, local_files_only=True).to(device).eval()
        self._pictures = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        self._texts = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._device = device

    @torch.no_grad()
    def picture_embeddings(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit vectors float32 [N, D]."""
        pixels = self._pictures([load_picture(p) for p in pictures], return_tensors="pt")["pixel_values"]
        states = self._model.vision_model(pixel_values=pixels.to(self._device)).pooler_output
        return _unit(self._model.visual_projection(states))

    @torch.no_grad()
    def text_embeddings(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors float32 [N, D]."""
        longest = self._model.config.text_config.max_position_embeddings
        batch = self._texts(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        ids, mask = batch["input_ids"].to(self._device), batch["attention_mask"].to(self._device)
        states = self._model.text_model(input_ids=ids, attention_mask=mask).pooler_output
        return _unit(self._model.text_projection(states))

    def agreement(self, pictures: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """Cosines float32 [N pictures, M texts] in [-1, 1]. Raises `ValueError` without a picture or a text."""
        if not pictures or not texts:
            raise ValueError("agreement needs at least one picture and one text")
        return self.picture_embeddings(pictures) @ self.text_embeddings(texts).T


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors.float(), dim=-1).cpu()


def best_candidate(agreement: Tensor) -> int:
    """The row of `agreement` [candidates, captions] with the largest value of all; the first of equals."""
    if agreement.ndim != 2 or not agreement.numel():
        raise ValueError(f"agreement must be [candidates, captions], at least 1 x 1, not {[*agreement.shape]}")
    return int(agreement.amax(1).argmax())
