"""Documents made from numbers: words and noise pictures, with lengths as in DreamLLM's data (spec sections B and C).

At 7B: captions of 40 to 70 tokens (pairs then have about 300 to 330 ids when read); interleaved documents of one to six
pictures, each before and after about 90 tokens of text, up to the context of 2048; dialogues about one picture with one
to four turns of 12 to 25 tokens asked and 20 to 150 answered. Smaller sizes shorten all texts by `Size.text_scale`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from benchmarks.models.sizes import TOKEN_NAMES, Size
from dreamllm.documents import ChatTemplate, Document, conversation, instruction_interleaved, interleaved, pair, prompt
from dreamllm.model import DreamLLMProcessor
from dreamllm.model.processor import CLIPImageProcessorPil, ProcessorSettings

SYSTEM_TOKENS = 40  # of the vicuna template's system sentence


def make_processor(size: Size) -> DreamLLMProcessor:
    """A processor whose every word is one token."""
    config = size.config()
    names = [*TOKEN_NAMES, *(f"w{i}" for i in range(config.vocab_size - len(TOKEN_NAMES)))]
    words = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="[PAD]",
        additional_special_tokens=list(TOKEN_NAMES[4:]),
    )
    side = config.vision_config.image_size
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return DreamLLMProcessor(image_processor, tokenizer, ProcessorSettings.from_config(config, template="plain"))


@dataclass
class Source:
    """Draws documents; the same seed gives the same ones."""

    size: Size
    seed: int = 0

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)
        config = self.size.config()
        self._words = config.vocab_size - len(TOKEN_NAMES)
        self._side = max(config.picture_size, config.vision_config.image_size)
        self._template = ChatTemplate("synthetic", self.words(SYSTEM_TOKENS, SYSTEM_TOKENS))

    def words(self, low: int, high: int) -> str:
        """Between `low` and `high` tokens at 7B, scaled to this size, at least one."""
        count = max(1, round(self._random.integers(low, high + 1) * self.size.text_scale))
        return " ".join(f"w{i}" for i in self._random.integers(0, self._words, count))

    def picture(self) -> Image.Image:
        """Coarse random colours, so that resizing leaves something to see."""
        coarse = self._random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((self._side, self._side), Image.Resampling.BICUBIC)

    def comprehension_pair(self) -> Document:
        return pair(self.picture(), self.words(40, 70), "comprehension")

    def creation_pair(self) -> Document:
        return pair(self.picture(), self.words(40, 70), "creation")

    def _interleaved_parts(self) -> tuple[list[str], list[tuple[int, Image.Image]]]:
        pictures = int(self._random.integers(1, 7))
        texts = [self.words(50, 130) for _ in range(pictures + 1)]
        return texts, [(i, self.picture()) for i in range(pictures)]

    def interleaved(self) -> Document:
        return interleaved(*self._interleaved_parts())

    def instruction_interleaved(self) -> Document:
        return instruction_interleaved(self.words(12, 40), *self._interleaved_parts(), self._template)

    def dialogue(self) -> Document:
        """About a picture, as LLaVA's instructions."""
        turns = []
        for turn in range(int(self._random.integers(1, 5))):
            turns.append(("user", f"{'<image> ' if turn == 0 else ''}{self.words(12, 25)}"))
            turns.append(("assistant", self.words(20, 150)))
        return conversation(turns, [self.picture()], self._template)

    def drawing_dialogue(self) -> Document:
        """A request and a picture that is drawn, as the instructions made from BLIP-LAION."""
        turns = [("user", self.words(40, 70)), ("assistant", f"{self.words(5, 10)} <dream>")]
        return conversation(turns, [self.picture()], self._template)

    def captioning_prompt(self) -> Document:
        return prompt(f"<image> {self.words(20, 20)}", [self.picture()])

    def drawing_prompt(self) -> Document:
        return prompt(self.words(10, 40))
