"""The short way to use a model from Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from dreamllm.documents import Document, Picture, PictureSource, Text, prompt
from dreamllm.inference.drawing import DrawingOptions, Progress, drawing_defaults
from dreamllm.inference.engine import Engine
from dreamllm.inference.options import Answer, GenerationOptions
from dreamllm.model import CheckpointError, DreamLLM, DreamLLMProcessor

_FILES = ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
_ALTERNATIVES = (("tokenizer.json", "tokenizer.model"), ("model.safetensors", "model.safetensors.index.json"))
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Assistant:
    """A model with its processor, ready to use::

        model = dreamllm.inference.load("runs/digits/model")
        print(model.caption("seven.png"))
        model.draw("seven").save("new.png")
        answer = model.chat("Count from two to five with pictures.")
        print(answer.text, answer.pictures)

    `engine` does the work and offers more control.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def caption(self, picture: PictureSource, options: GenerationOptions | None = None) -> str:
        """Describes a picture in words. Raises `PictureError` for one that cannot be read."""
        return self.caption_many([picture], options)[0]

    def caption_many(self, pictures: Sequence[PictureSource], options: GenerationOptions | None = None) -> list[str]:
        """Describes each picture on its own, in the prompt form of captioning pairs: `<s>` and the picture."""
        options = options or GenerationOptions(pictures="forbid")
        prompts = [Document((Picture(picture, comprehension=True),), "error", "caption prompt") for picture in pictures]
        return [answer.text for answer in self.engine.answers(prompts, options)]

    def draw(
        self, caption: str, seed: int = 0, options: DrawingOptions | None = None, progress: Progress | None = None
    ) -> Image.Image:
        """Draws a picture for a raw caption (no chat template, as creation pairs are trained)."""
        return self.draw_many([caption], [seed], options, progress)[0][0]

    def draw_many(
        self,
        captions: Sequence[str],
        seeds: Sequence[int] | None = None,
        options: DrawingOptions | None = None,
        progress: Progress | None = None,
    ) -> list[list[Image.Image]]:
        """Draws `options.candidates` pictures for each caption; `seeds`: one per caption (default 0, 1, ...).

        Raises `ValueError` for an empty or over-long caption and a wrong number of seeds.
        """
        drawing = options or drawing_defaults(self.engine.model)
        prompts = [Document((Text(caption),), "error", "caption") for caption in captions]
        forced = GenerationOptions(max_new_tokens=0, pictures="force", drawing=drawing)
        return [answer.pictures for answer in self.engine.answers(prompts, forced, seeds, progress)]

    def chat(
        self,
        turns: str | Sequence[tuple[str, str]],
        pictures: Sequence[PictureSource] = (),
        options: GenerationOptions | None = None,
        progress: Progress | None = None,
    ) -> Answer:
        """Answers a dialogue: the user's only message, or (role, text) turns, the last from the user.

        `<image>` in a message stands for the next of `pictures`, `<dream>` in an earlier answer for a picture created
        there. Raises `ValueError` when they do not match or the roles do not alternate.
        """
        if isinstance(turns, str):
            turns = [("user", turns)]
        if not turns or turns[-1][0] != "user":
            raise ValueError("the last turn of a dialogue must be the user's")
        if not turns[-1][1].strip():
            raise ValueError("the message is empty; give it text or a picture")
        return self.engine.answer(self.engine.processor.chat(turns, pictures), options, progress)

    def write(
        self,
        start: str | Document,
        pictures: Sequence[PictureSource] = (),
        options: GenerationOptions | None = None,
        progress: Progress | None = None,
    ) -> Answer:
        """Continues a raw text (`<image>` stands for the next of `pictures`) or a document."""
        if isinstance(start, Document) and pictures:
            raise ValueError("a Document holds its own pictures; give pictures only with a text")
        document = start if isinstance(start, Document) else prompt(start, pictures)
        return self.engine.answer(document, options, progress)


def load(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: str = "float32",
    batch_size: int = 32,
    fused_operators: bool = True,
) -> Assistant:
    """Loads a model folder (as training and `dreamllm convert` write it).

    `dtype` is that of the weights, e.g. "bfloat16"; `batch_size` as in `Engine`; `fused_operators` as in
    `DreamLLM.use_fused_operators`. No parameter requires a gradient. Raises `CheckpointError` naming the files that are
    missing from an incomplete folder and the tensors that do not fit, `FileNotFoundError` when there is no such folder.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, not {dtype!r}")
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"model folder {folder} does not exist")
    missing = [name for name in _FILES if not (folder / name).is_file()]
    missing += [" or ".join(names) for names in _ALTERNATIVES if not any((folder / name).is_file() for name in names)]
    if missing:
        raise CheckpointError(f"model folder {folder} is incomplete; missing: {', '.join(missing)}")
    model = DreamLLM.from_pretrained(folder, dtype=_DTYPES[dtype]).to(device).eval()  # type: ignore[arg-type]
    model.requires_grad_(False)
    model.use_fused_operators(fused_operators)
    return Assistant(Engine(model, DreamLLMProcessor.from_pretrained(folder), batch_size))
