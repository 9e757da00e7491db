"""Token ids and slot counts that decide how a document becomes a sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

IGNORE_INDEX = -100

SPECIAL_TOKENS = ("<image>", "<im_patch>", "<im_start>", "<im_end>", "<dream>", "<dream_start>", "<dream_end>")
"""The tokens DreamLLM adds to a language model, in the order in which they are added to a new tokenizer."""

PAD_TOKEN = "[PAD]"

Encode = Callable[[str], list[int]]
"""Text -> ids, without special tokens."""


@dataclass(frozen=True)
class SequenceLayout:
    """How text and pictures become ids: special-token ids (read from the tokenizer, never assumed) and slot counts.

    `tokens_per_image` is the number of CLIP patch features per picture, `num_dream_queries` the number of dream
    queries per created picture, `max_length` the longest sequence in tokens.
    """

    bos: int
    eos: int
    pad: int
    im_start: int
    im_patch: int
    im_end: int
    dream_start: int
    dream_end: int
    tokens_per_image: int
    num_dream_queries: int
    max_length: int
    vocab_size: int

    def __post_init__(self) -> None:
        shortest = 2 + max(self.image_length, self.dream_length)
        if self.max_length < shortest:
            raise ValueError(
                f"max_length {self.max_length} cannot hold one picture: {shortest} tokens are needed "
                f"({self.tokens_per_image} image patches, {self.num_dream_queries} dream queries and their markers)"
            )

    @property
    def image_length(self) -> int:
        """Tokens of an input picture with its markers."""
        return self.tokens_per_image + 2

    @property
    def dream_length(self) -> int:
        """Tokens of a created picture with its markers."""
        return self.num_dream_queries + 2

    def image_ids(self) -> list[int]:
        return [self.im_start, *[self.im_patch] * self.tokens_per_image, self.im_end]

    def dream_ids(self) -> list[int]:
        return [self.dream_start, *[self.im_patch] * self.num_dream_queries, self.dream_end]
