"""What a caller may decide about an answer, and the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from PIL import Image

from dreamllm.documents import Document, Picture
from dreamllm.inference.beams import EarlyStopping
from dreamllm.inference.drawing import DrawingOptions

Pictures = Literal["allow", "forbid", "force"]
Stopped = Literal["end", "length", "context", "stop"]


@dataclass(frozen=True)
class GenerationOptions:
    """How an answer is written.

    Attributes:
        max_new_tokens: most tokens the model may choose: text, `<dream_start>` and the end token. The positions that
            pictures take are not counted. 0 only with forced pictures: draw and stop.
        min_new_tokens: the end token is not chosen before so many tokens.
        max_pictures: most pictures in the answer; None: as many as the context holds.
        pictures: "allow" lets the model decide, "forbid" never draws, "force" draws one before anything is written
            (the model may then write and draw on).
        temperature: 0 takes the most likely token; otherwise tokens are sampled at this temperature.
        top_p: sample from the smallest set of tokens whose probability reaches this, in (0, 1].
        top_k: sample from this many most likely tokens; 0: from all.
        repetition_penalty: logits of tokens that the prompt or the answer holds already are divided (where positive)
            or multiplied (where negative) by this; 1: not (Keskar et al. 2019, section 4.1).
        num_beams: 1 writes token by token; more search for the likeliest answer with so many beams, by the rules of
            transformers' beam search. Only with forbidden pictures and temperature 0.
        length_penalty: beams are ranked by the logarithm of their probability over length ** length_penalty.
        early_stopping: when a beam search ends: False, True or "never", as in transformers.
        stop: strings that end the answer; it holds what comes before the first of them since the last picture.
        seed: of the first request; decides the sampling and the noise of its pictures. Request i has seed + i unless
            seeds are given.
        drawing: how pictures are drawn; None: as the model's configuration recommends.

    Raises `ValueError` when made with a value outside these ranges.
    """

    max_new_tokens: int = 512
    min_new_tokens: int = 0
    max_pictures: int | None = None
    pictures: Pictures = "allow"
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    stop: tuple[str, ...] = ()
    seed: int = 0
    drawing: DrawingOptions | None = None

    def __post_init__(self) -> None:
        if self.pictures not in ("allow", "forbid", "force"):
            raise ValueError(f"pictures must be 'allow', 'forbid' or 'force', not {self.pictures!r}")
        if self.max_new_tokens < (0 if self.pictures == "force" else 1):
            raise ValueError(
                f"max_new_tokens must be at least 1 (or 0 with pictures='force'), not {self.max_new_tokens}"
            )
        if self.max_pictures is not None and self.max_pictures < (1 if self.pictures == "force" else 0):
            raise ValueError(f"max_pictures must be at least 0 (or 1 with pictures='force'), not {self.max_pictures}")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be a finite number of at least 0, not {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, not {self.top_k}")
        if self.temperature == 0.0 and (self.top_p < 1.0 or self.top_k):
            raise ValueError("top_p and top_k need a temperature above 0; at 0 the most likely token is taken")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens must be from 0 to max_new_tokens ({self.max_new_tokens}), not {self.min_new_tokens}"
            )
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be positive and finite, not {self.repetition_penalty}")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop must be a tuple of strings that are not empty, not {self.stop!r}")
        self._check_beams()

    def _check_beams(self) -> None:
        if self.num_beams < 1:
            raise ValueError(f"num_beams must be at least 1, not {self.num_beams}")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f"early_stopping must be True, False or 'never', not {self.early_stopping!r}")
        if not abs(self.length_penalty) < float("inf"):
            raise ValueError(f"length_penalty must be finite, not {self.length_penalty}")
        if self.num_beams > 1 and self.temperature:
            raise ValueError(f"beams take no chances: with num_beams {self.num_beams} the temperature must be 0")
        if self.num_beams > 1 and self.pictures != "forbid":
            raise ValueError("beams write text only: with num_beams above 1, pictures must be 'forbid'")
        if self.num_beams == 1 and (self.length_penalty != 1.0 or self.early_stopping is not False):
            raise ValueError("length_penalty and early_stopping decide among beams; set num_beams above 1")


@dataclass(frozen=True)
class Answer:
    """What the model made of a prompt.

    `document` holds its text, pictures (PIL, 8 bit) and, where the model ended it, the end token. `token_ids` are the
    tokens that the model chose, in order. `stopped`: "end" (the model chose the end token), "length" (`max_new_tokens`
    or a lone forced picture), "context" (no room left) or "stop" (a stop string). `score`: of a beam search, the
    logarithm of the answer's probability over its length ** length_penalty.
    """

    document: Document
    token_ids: tuple[int, ...]
    stopped: Stopped
    score: float | None = None

    @property
    def text(self) -> str:
        """The text without the pictures; pieces between pictures joined by a space."""
        return self.document.text()

    @property
    def pictures(self) -> list[Image.Image]:
        sources = [part.source for part in self.document.parts if isinstance(part, Picture)]
        return [source for source in sources if isinstance(source, Image.Image)]
