"""The short way to use a model from Python."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from dreamllm.documents import REWRITING, Document, Picture, PictureSource, Text, prompt
from dreamllm.inference.drawing import DrawingOptions, Progress, check_seeds, drawing_defaults
from dreamllm.inference.engine import Engine
from dreamllm.inference.options import Answer, GenerationOptions
from dreamllm.inference.quantisation import quantise_weights
from dreamllm.model import CheckpointError, DreamLLM, DreamLLMProcessor

_FILES = ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
_ALTERNATIVES = (("tokenizer.json", "tokenizer.model"), ("model.safetensors", "model.safetensors.index.json"))
LONGEST_CAPTION = 77
"""Tokens of a rewritten request: what CLIP's text encoder, which Stable Diffusion was trained with, reads."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Assistant:
    """A model with its processor, ready to use::

        model = dreamllm.inference.load("runs/digits/model")
        print(model.caption("seven.png"))
        model.text_to_image("seven").save("new.png")
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

    def answer(
        self, question: str, pictures: Sequence[PictureSource] = (), options: GenerationOptions | None = None
    ) -> str:
        """Answers one question, usually about pictures, in words, in the chat form of visual questions.

        `<image>` in the question stands for the next of `pictures`; without it they come first. Raises as `chat`.
        """
        options = options or GenerationOptions(pictures="forbid")
        if options.pictures != "forbid":
            raise ValueError("answer writes words only; use pictures='forbid', or chat")
        return self.chat(with_places(question, pictures), pictures, options).text

    def text_to_image(
        self,
        caption: str,
        seed: int = 0,
        options: DrawingOptions | None = None,
        progress: Progress | None = None,
        rewrite: bool = False,
    ) -> Image.Image:
        """Draws a picture for a raw caption (no chat template, as creation pairs are trained). See
        `text_to_image_many`; of several candidates the first, or with `options.select` the chosen one."""
        return self.text_to_image_many([caption], [seed], options, progress, rewrite)[0][0]

    def text_to_image_many(
        self,
        captions: Sequence[str],
        seeds: Sequence[int] | None = None,
        options: DrawingOptions | None = None,
        progress: Progress | None = None,
        rewrite: bool = False,
    ) -> list[list[Image.Image]]:
        """Draws `options.candidates` pictures for each caption (with `options.select` the chosen one); `seeds`: one per
        caption (default 0, 1, ...). `rewrite`: the model first makes a caption of each request (`rewritten`).

        Raises `ValueError` for an empty or over-long caption and a wrong number of seeds.
        """
        seeds = range(len(captions)) if seeds is None else seeds
        check_seeds(seeds, len(captions), "caption")
        drawing = options or drawing_defaults(self.engine.model)
        captions = self.rewritten(captions) if rewrite else captions
        prompts = [Document((Text(caption),), "error", "caption") for caption in captions]
        return [answer.pictures for answer in self.engine.answers(prompts, _lone(drawing), seeds, progress)]

    def rewritten(self, requests: Sequence[str], options: GenerationOptions | None = None) -> list[str]:
        """Each request as the model's own caption of a picture, asked for by `dreamllm.documents.REWRITING` (spec F.5).

        Raises `ValueError` for an empty request, and where the model writes nothing.
        """
        for request in requests:
            _check_message(request)
        options = options or GenerationOptions(max_new_tokens=LONGEST_CAPTION, pictures="forbid")
        asked = [self.engine.processor.chat([("user", REWRITING.format(request=request))]) for request in requests]
        captions = [answer.text.strip() for answer in self.engine.answers(asked, options)]
        for request, caption in zip(requests, captions, strict=True):
            if not caption:
                raise ValueError(f"the model rewrote {request!r} into nothing; draw it as it is")
        return captions

    def image_to_image(
        self,
        request: str,
        pictures: Sequence[PictureSource],
        seed: int = 0,
        options: DrawingOptions | None = None,
        progress: Progress | None = None,
    ) -> Image.Image:
        """Draws a picture after one or two given ones: edited, with the same subject, or both composed (spec F.5).

        They stand in a chat message with the request, where `<image>` is the next of them; without it they come first.
        The message's states condition the drawing. Raises `ValueError` for another number of pictures, an empty request
        and one that is too long; `PictureError` for a picture that cannot be read.
        """
        _check_message(request)
        if len(pictures) not in (1, 2):
            raise ValueError(f"image_to_image takes one or two pictures, not {len(pictures)}")
        asked = self.engine.processor.chat([("user", with_places(request, pictures))], pictures)
        drawing = options or drawing_defaults(self.engine.model)
        return self.engine.answers([asked], _lone(drawing), [seed], progress)[0].pictures[0]

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
        _check_message(turns[-1][1])
        return self.engine.answer(self.engine.processor.chat(turns, pictures), options, progress)

    def write_document(
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


def with_places(text: str, pictures: Sequence[PictureSource]) -> str:
    """A message in which `<image>` stands for each picture: at the beginning where it says nothing of them."""
    return text if "<image>" in text else "<image>" * len(pictures) + text


def _check_message(text: str) -> None:
    if not text.strip():
        raise ValueError("the message is empty; give it text or a picture")


def _lone(drawing: DrawingOptions) -> GenerationOptions:
    return GenerationOptions(max_new_tokens=0, pictures="force", drawing=drawing)


def load(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: str = "float32",
    batch_size: int = 32,
    fused_operators: bool = True,
    int8_weights: bool = False,
) -> Assistant:
    """Loads a model folder (as training and `dreamllm convert` write it).

    `dtype` is that of the weights, e.g. "bfloat16"; `batch_size` as in `Engine`; `fused_operators` as in
    `DreamLLM.use_fused_operators`; `int8_weights`: the decoder's weights in eight bits, as `quantise_weights` makes
    them. No parameter requires a gradient. Raises `CheckpointError` naming the files that are
    missing from an incomplete folder and the tensors that do not fit, `FileNotFoundError` when there is no such folder.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, not {dtype!r}")
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"model folder {folder} does not exist")
    missing = [name for name in _FILES if not (folder / name).is_file()]
    missing += [" or ".join(names) for names in _ALTERNATIVES if not any((folder / name).is_file() for name in names)]
    missing += _missing_shards(folder)
    if missing:
        raise CheckpointError(f"model folder {folder} is incomplete; missing: {', '.join(missing)}")
    model = DreamLLM.from_pretrained(folder, dtype=_DTYPES[dtype]).to(device).eval()  # type: ignore[arg-type]
    model.requires_grad_(False)
    model.use_fused_operators(fused_operators)
    if int8_weights:
        quantise_weights(model)
    return Assistant(Engine(model, DreamLLMProcessor.from_pretrained(folder), batch_size))


def _missing_shards(folder: Path) -> list[str]:
    """Files of weights that the folder's index names and that are not there."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return []
    try:
        shards = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of weights ({error}); copy the model folder again") from error
    return sorted(shard for shard in shards if not (folder / shard).is_file())
