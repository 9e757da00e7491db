"""The processor: text and pictures -> tensors, and ids -> text. Saved beside the model's weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from dreamllm.documents import (
    SPECIAL_TOKENS,
    ChatTemplate,
    Document,
    EncodedDocument,
    PackedBatch,
    SequenceLayout,
    chat_template,
    conversation,
    encode_document,
    load_picture,
    pack_batch,
)
from dreamllm.documents.batch import Pixels, check_encoded
from dreamllm.documents.formats import prompt
from dreamllm.documents.layout import IGNORE_INDEX, PAD_TOKEN
from dreamllm.documents.picture import PictureSource
from dreamllm.model.configuration import DreamLLMConfig
from dreamllm.model.folders import resolve_folder
from dreamllm.model.pixels import VisionPixels, target_pixels

try:  # the name since the Pillow and torchvision back ends were separated; before, this was the only class
    from transformers import CLIPImageProcessorPil
except ImportError:
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil

SENTENCEPIECE_FILE = "tokenizer.model"
SETTINGS_FILE = "processor_config.json"


@dataclass(frozen=True)
class ProcessorSettings:
    """What the processor needs to know of the model.

    `target_size`, `target_channels`: side in pixels and channels (1 or 3) of pictures to create. `template`: name of
    the chat template.
    """

    tokens_per_image: int
    num_dream_queries: int
    max_length: int
    vocab_size: int
    target_size: int
    target_channels: int = 3
    template: str = "vicuna_v1.1"

    @staticmethod
    def from_config(config: DreamLLMConfig, **overrides: Any) -> ProcessorSettings:
        values = {
            "tokens_per_image": config.tokens_per_image,
            "num_dream_queries": config.num_dream_queries,
            "max_length": config.max_sequence_length,
            "vocab_size": config.vocab_size,
            "target_size": config.picture_size,
            "target_channels": config.picture_channels,
        }
        return ProcessorSettings(**{**values, **overrides})


class DreamLLMProcessor(ProcessorMixin):
    """Tokenizer, picture transforms and chat template of one model.

    Text is tokenised piece by piece between special tokens, as the released weights were trained; with a
    sentencepiece model in the folder its own encoder is used, so ids equal the original slow tokenizer's exactly.
    Strings that look like special tokens inside text stay text.
    """

    def __init__(
        self,
        image_processor: CLIPImageProcessorPil,
        tokenizer: PreTrainedTokenizerBase,
        settings: ProcessorSettings,
        sentencepiece_model: bytes | None = None,
    ) -> None:
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.settings = settings
        self.sentencepiece_model = sentencepiece_model
        self.chat_template = None
        self._vision = VisionPixels(image_processor)
        self._pieces = None
        if sentencepiece_model is not None:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
        self.token_ids = special_token_ids(tokenizer)
        self.layout = SequenceLayout(
            **self.token_ids,
            tokens_per_image=settings.tokens_per_image,
            num_dream_queries=settings.num_dream_queries,
            max_length=settings.max_length,
            vocab_size=settings.vocab_size,
        )

    # -- text ------------------------------------------------------------

    @property
    def template(self) -> ChatTemplate:
        return chat_template(self.settings.template)

    def encode_text(self, text: str) -> list[int]:
        """Ids of a piece of text, without special tokens."""
        if self._pieces is not None:
            return self._pieces.encode(text)
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode_text(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens are left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    # -- documents ------------------------------------------------------------

    def encode(self, document: Document) -> EncodedDocument:
        """Document -> ids, labels and picture slots. See `encode_document`."""
        return encode_document(document, self.layout, self.encode_text)

    def pack(
        self,
        documents: Sequence[EncodedDocument],
        with_null: bool = False,
        moments: Sequence[Tensor | None] | None = None,
        as_bytes: bool = False,
    ) -> PackedBatch:
        """Encoded documents -> one packed batch with transformed pictures. See `pack_batch`."""
        return pack_batch(documents, self.layout, self, with_null, moments, as_bytes)

    def pad(self, documents: Sequence[EncodedDocument], padding_side: str = "right") -> dict[str, Tensor]:
        """Encoded documents -> a padded batch for `DreamLLM.forward` and `generate`."""
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', not {padding_side!r}")
        for document in documents:
            check_encoded(document, self.layout)
        longest = max(len(d) for d in documents)

        def rows(values: Sequence[Sequence[int]], fill: int) -> Tensor:
            fills = [[fill] * (longest - len(v)) for v in values]
            padded = [[*v, *f] if padding_side == "right" else [*f, *v] for v, f in zip(values, fills, strict=True)]
            return torch.tensor(padded)

        batch = {
            "input_ids": rows([d.input_ids for d in documents], self.layout.pad),
            "attention_mask": rows([[1] * len(d) for d in documents], 0),
            "labels": rows([d.labels for d in documents], IGNORE_INDEX),
        }
        images = [load_picture(source) for d in documents for source in d.images]
        targets = [load_picture(source) for d in documents for source in d.targets]
        if images:
            batch["pixel_values"] = self.vision(images)
        if targets:
            batch["target_pixel_values"] = self.target(targets)
        return batch

    def __call__(
        self,
        text: str | Sequence[str],
        images: Sequence[PictureSource] | None = None,
        padding_side: str = "left",
    ) -> dict[str, Tensor]:
        """Raw prompts -> a padded batch. `<image>` in a prompt stands for the next of `images`.

        Raises `ValueError` when placeholders and pictures do not match, or a prompt exceeds the context.
        """
        texts = [text] if isinstance(text, str) else list(text)
        queue = list(images or [])
        wanted = sum(t.count("<image>") for t in texts)
        if wanted != len(queue):
            raise ValueError(f"the text has {wanted} <image> placeholders but {len(queue)} pictures were given")
        encoded = []
        for t in texts:
            count = t.count("<image>")
            encoded.append(self.encode(prompt(t, queue[:count])))
            del queue[:count]
        batch = self.pad(encoded, padding_side)
        del batch["labels"]
        return batch

    def chat(self, turns: Sequence[tuple[str, str]], pictures: Sequence[PictureSource] = ()) -> Document:
        """Turns (role, text), the last from the user, as a prompt that awaits the assistant's answer."""
        document = conversation(turns, pictures, self.template)
        return Document(document.parts, "error", document.name)

    # -- pictures ------------------------------------------------------------

    def vision(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB pictures -> CLIP pixel values [N, 3, h, w], float32."""
        return self.vision_pixels(images).expanded()

    def target(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB pictures -> diffusion targets [N, C, size, size] in [-1, 1]: short side resized, centre crop."""
        return self.target_pixels(images).expanded()

    def vision_pixels(self, images: Sequence[Image.Image]) -> Pixels:
        """What `vision` returns, as bytes if the image processor is of the usual kind."""
        return self._vision(images)

    def target_pixels(self, images: Sequence[Image.Image]) -> Pixels:
        """What `target` returns, as bytes."""
        return target_pixels(images, self.settings.target_size, self.settings.target_channels)

    def describe_target(self) -> dict[str, Any]:
        """What `target` does to a picture, as JSON values: latents that were made after another transform differ."""
        return {
            "size": self.settings.target_size,
            "channels": self.settings.target_channels,
            "resize": "short side, bilinear",
            "crop": "centre",
            "range": "-1 to 1",
        }

    # -- files ------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Writes tokenizer, image processor and settings into `save_directory`."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        if self.sentencepiece_model is not None:
            (folder / SENTENCEPIECE_FILE).write_bytes(self.sentencepiece_model)
        self.image_processor.save_pretrained(folder)
        settings = {"processor_class": type(self).__name__, **asdict(self.settings)}
        (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> DreamLLMProcessor:
        """Loads a processor saved by `save_pretrained`."""
        folder = resolve_folder(pretrained_model_name_or_path)
        if not (folder / SETTINGS_FILE).is_file():
            raise FileNotFoundError(f"{folder} has no {SETTINGS_FILE}; it is not a DreamLLM folder")
        settings = json.loads((folder / SETTINGS_FILE).read_text())
        del settings["processor_class"]
        return cls(
            CLIPImageProcessorPil.from_pretrained(folder),
            load_tokenizer(folder),
            ProcessorSettings(**settings),
            read_sentencepiece(folder),
        )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Loads a folder's tokenizer without fetching anything."""
    # An explicit configuration keeps the folder's config.json, which may be the original program's, out of it.
    return AutoTokenizer.from_pretrained(folder, config=PretrainedConfig(), local_files_only=True)


def read_sentencepiece(folder: Path) -> bytes | None:
    path = folder / SENTENCEPIECE_FILE
    return path.read_bytes() if path.is_file() else None


def add_special_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Adds the padding token and DreamLLM's tokens where missing; returns how many were added.

    Tokens that exist keep their ids, whatever their order.
    """
    added = 0
    known = tokenizer.get_vocab()
    if tokenizer.pad_token is None:
        added += tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    missing = [token for token in SPECIAL_TOKENS if token not in known]
    return added + tokenizer.add_tokens(missing, special_tokens=True)


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The ids that `SequenceLayout` needs, read from the tokenizer. Raises `ValueError` naming what is missing."""
    vocabulary = tokenizer.get_vocab()
    markers = ("im_start", "im_patch", "im_end", "dream_start", "dream_end")
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    ids |= {name: vocabulary.get(f"<{name}>") for name in markers}
    missing = [name for name, token in ids.items() if token is None]
    if missing:
        raise ValueError(f"the tokenizer lacks {', '.join(missing)}; was add_special_tokens() called on it?")
    return ids


AutoProcessor.register(DreamLLMConfig, DreamLLMProcessor, exist_ok=True)
