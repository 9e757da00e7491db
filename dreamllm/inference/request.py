"""One answer in the making: what has been written and drawn, what may come next, and who is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from dreamkernels.integrations.paged_cache import CachedSequence
from dreamllm.documents import Document, EncodedDocument, End, Part, Picture, SequenceLayout, Text
from dreamllm.inference.beams import BeamSearch
from dreamllm.inference.drawing import DrawingOptions, Progress
from dreamllm.inference.options import Answer, GenerationOptions, Stopped

State = Literal["waiting", "prompt", "writing", "dreaming", "drawing", "reading", "done"]
"""waiting: for a place in the batch. prompt, dreaming, reading: the prompt, the dream queries or a created picture are
to be appended to the cache. writing: a token is. drawing: a picture is being denoised or waits for room. done: see
`error`."""


@dataclass(frozen=True)
class NewText:
    """A piece of the answer's text. The pieces between two pictures make one text, but for bytes that the model writes
    without their making a character: they come as nothing or as what they seemed to be."""

    text: str


@dataclass(frozen=True)
class NewPicture:
    """A picture of the answer."""

    picture: Image.Image


@dataclass(frozen=True)
class Preview:
    """What there is of a picture, of candidate number `candidate`, after `step` of `steps` denoising steps."""

    picture: Image.Image
    step: int
    steps: int
    candidate: int = 0


Event = NewText | NewPicture | Preview
OnEvent = Callable[[Event], None]


class Request:
    """A prompt given to an engine, and its answer once it is `done`.

    `error` is what went wrong with this request alone. Made by `Engine.submit`.
    """

    def __init__(
        self,
        encoded: EncodedDocument,
        options: GenerationOptions,
        drawing: DrawingOptions,
        seed: int,
        layout: SequenceLayout,
        decode: Callable[[list[int]], str],
        on_event: OnEvent | None = None,
        preview_every: int = 0,
        progress: Progress | None = None,
        asked: str = "",
    ) -> None:
        self.encoded, self.options, self.drawing, self.seed = encoded, options, drawing, seed
        self.state: State = "waiting"
        self.error: BaseException | None = None
        self.preview_every = preview_every
        self.progress = progress
        self.generator = torch.Generator().manual_seed(seed)
        self.sequences: list[CachedSequence] = []
        self.search: BeamSearch | None = None
        self.chosen: list[int] = []
        self.condition: Tensor | None = None  # [Q, C], of the picture to draw
        self.candidates: list[Image.Image | None] = []  # of the picture that is being drawn
        self.num_begun = 0  # of these candidates
        self.num_drawn = 0
        self.length = len(encoded)  # positions
        self.wants_picture = options.pictures == "force"
        self.cancelled = False
        self._layout, self._decode, self._on_event, self._asked = layout, decode, on_event, asked
        self._parts: list[Part] = []
        self._text_ids: list[int] = []
        self._text_told = ""
        self._stopped: Stopped | None = None
        self._score: float | None = None
        if options.num_beams > 1:
            room = layout.max_length - self.length
            ends = self._text_of_stops if options.stop else None
            most = min(options.max_new_tokens, room)
            self.search = BeamSearch(
                options.num_beams, layout.eos, most, options.length_penalty, options.early_stopping, ends
            )

    # -- for callers ---------------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        return self.state == "done"

    @property
    def answer(self) -> Answer:
        """The answer. Raises what went wrong with this request, and `RuntimeError` before it is done."""
        if self.error is not None:
            raise self.error
        if self._stopped is None:
            raise RuntimeError("this request was cancelled" if self.cancelled else "this request is not done yet")
        parts = (*self._parts, End()) if self._stopped == "end" else tuple(self._parts)
        return Answer(Document(parts, "error", "answer"), tuple(self.chosen), self._stopped, self._score)

    def cancel(self) -> None:
        """Stops the work on this request before the engine's next step."""
        self.cancelled = True

    def draw_now(self) -> None:
        """Makes a picture the next thing in this answer; one that is in work counts and leaves room for another only
        where it fits. Raises `ValueError` where there may be none."""
        if self.done or self.search is not None or not self.may_draw:
            raise ValueError(
                "no picture can be drawn now: the answer is done, its pictures are forbidden or as many as allowed, "
                "or no more fits into the context"
            )
        self.wants_picture = True

    # -- for the engine ------------------------------------------------------------------------------------------------

    @property
    def may_draw(self) -> bool:
        most = self.options.max_pictures
        fits = self.length + self._layout.dream_length + self._layout.image_length <= self._layout.max_length
        return fits and self.options.pictures != "forbid" and (most is None or self.num_drawn < most)

    @property
    def lone_picture(self) -> bool:
        """Whether nothing is written: the answer ends with the picture that is drawn first."""
        return self.options.max_new_tokens == 0

    @property
    def next_is_picture(self) -> bool:
        """Whether the dream queries are part of what is appended next."""
        return self.state == "dreaming" or (self.state == "prompt" and self.wants_picture)

    @property
    def end_forbidden(self) -> bool:
        written = len(self.chosen) if self.search is None else self.search.length
        return written < self.options.min_new_tokens

    @property
    def next_tokens(self) -> list[int]:
        """What is to be appended to each of the sequences."""
        return self.chosen[-1:] if self.search is None else [beam[-1] for beam in self.search.beams]

    def take(self, token: int) -> None:
        """Continues the answer with a token."""
        self.chosen.append(token)
        if token == self._layout.dream_start:
            self.wants_picture = False
            self.state = "dreaming"
            return
        self.length += 1
        self.state = "writing"
        if token == self._layout.eos:
            self._stop("end")
            return
        self._text_ids.append(token)
        text = self._text_so_far()
        if text is not None and self._cut(text) != text:
            self._stop("stop")
        elif limit := self._limit():
            self._stop(limit)
        elif text is not None:
            self._tell(text, finished=False)

    def take_pictures(self) -> None:
        """Continues the answer with the pictures that were drawn."""
        self._close_text()
        for picture in self.candidates:
            assert picture is not None
            self._parts.append(Picture(picture, comprehension=True, creation=True))
            self.tell(NewPicture(picture))
        self.num_drawn += len(self.candidates)
        self.length += self._layout.dream_length + self._layout.image_length
        self.condition = None
        self.state = "reading"
        if limit := self._limit():
            self._stop(limit)

    def finish_search(self) -> None:
        """Takes the best beam as the answer."""
        assert self.search is not None
        best = self.search.best
        self.chosen, self._score = list(best.tokens), best.score
        ended = best.tokens[-1] == self._layout.eos
        self._text_ids = self.chosen[:-1] if ended else list(self.chosen)
        self.length += len(self.chosen)
        text = self._text_so_far()
        stopped = not ended and text is not None and self._cut(text) != text
        self._stop("end" if ended else "stop" if stopped else self._limit() or "length")

    def tell(self, event: Event) -> None:
        if self._on_event is not None:
            self._on_event(event)

    @property
    def picture_text(self) -> str:
        """What the picture in work should show: the text before it, or what was asked for."""
        return self._cut(self._decode(self._text_ids)).strip() or self._asked

    @property
    def num_kept(self) -> int:
        """How many of a picture's candidates become part of the answer."""
        return self.drawing.candidates if self.drawing.select is None else 1

    @property
    def listens(self) -> bool:
        return self._on_event is not None

    def attempt(self, function: Callable[..., None], *args: Any) -> None:
        """Calls something that concerns this request alone; what it raises ends this request alone."""
        try:
            function(*args)
        except Exception as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        self.error = error
        self.state = "done"

    # -- limits and text -----------------------------------------------------------------------------------------------

    def _stop(self, why: Stopped) -> None:
        self._close_text()
        self._stopped = why
        self.state = "done"

    def _limit(self) -> Stopped | None:
        if len(self.chosen) >= self.options.max_new_tokens:
            return "length"
        return "context" if self.length >= self._layout.max_length else None

    def _text_so_far(self) -> str | None:
        """The text since the last picture without a last half character, where somebody needs to know it."""
        return self._decode(self._text_ids).rstrip("\ufffd") if self.options.stop or self.listens else None

    def _text_of_stops(self, tokens: Sequence[int]) -> bool:
        text = self._decode([token for token in tokens if token != self._layout.eos]).rstrip("\ufffd")
        return self._cut(text) != text

    def _cut(self, text: str) -> str:
        """The text before the first stop string."""
        found = [text.find(stop) for stop in self.options.stop]
        return text[: min((place for place in found if place >= 0), default=len(text))]

    def _tell(self, text: str, finished: bool) -> None:
        """Tells what is new; unless the text is finished, without what may be the beginning of a stop string or of a
        character, whose bytes may be tokens of their own."""
        if not finished:
            text = text.rstrip("\ufffd")
            for stop in self.options.stop:
                held = next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
                text = text[: len(text) - held]
        # Bytes that are no text may be decoded otherwise once others follow; what was told stays told.
        pairs = enumerate(zip(text, self._text_told, strict=False))
        known = next((i for i, (now, then) in pairs if now != then), min(len(text), len(self._text_told)))
        if len(text) > known and (finished or len(text) > len(self._text_told)):
            self.tell(NewText(text[known:]))
            self._text_told = text

    def _close_text(self) -> None:
        text = self._cut(self._decode(self._text_ids))
        if self.listens:
            self._tell(text, finished=True)
        self._text_ids, self._text_told = [], ""
        if text:
            self._parts.append(Text(text))
