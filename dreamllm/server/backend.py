"""What the server asks of whatever makes the answers.

A backend takes work from the server's event loop and tells of its progress from a thread of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from PIL import Image

from dreamllm.documents import Document
from dreamllm.inference import GenerationOptions
from dreamllm.inference.options import Stopped


@dataclass(frozen=True)
class Work:
    """One answer to be made. `options.seed` is its seed; `preview_every` as in `Engine.stream`."""

    prompt: Document
    options: GenerationOptions
    preview_every: int = 0


@dataclass(frozen=True)
class Usage:
    """What an answer took: positions of the prompt, tokens that the model chose, pictures that it drew."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    pictures: int = 0


@dataclass(frozen=True)
class Started:
    """The work has left the queue."""


@dataclass(frozen=True)
class TextPiece:
    """The next piece of the answer's text."""

    text: str


@dataclass(frozen=True)
class PictureDrawn:
    """The next picture of the answer."""

    image: Image.Image


@dataclass(frozen=True)
class PictureStep:
    """What there is of the picture in work, of candidate number `candidate`, after `step` of `steps`."""

    image: Image.Image
    step: int
    steps: int
    candidate: int = 0


@dataclass(frozen=True)
class Finished:
    """The end of an answer. `reason`: as in `Answer.stopped`, or that it was cancelled; then there is no `document`."""

    reason: Stopped | Literal["cancelled"]
    usage: Usage = field(default_factory=Usage)
    document: Document | None = None


@dataclass(frozen=True)
class Failed:
    """The end of work that has no answer.

    `fault`: "request" (the message says what is wrong with it), "server" (an error that was logged) or "closed" (the
    backend takes no more work).
    """

    message: str
    fault: Literal["request", "server", "closed"]


Event = Started | TextPiece | PictureDrawn | PictureStep | Finished | Failed
Emit = Callable[[Event], None]
"""Told of every event of one work, in order, from the backend's thread; must return at once."""


@dataclass(frozen=True)
class Load:
    """How many works wait and how many are being answered."""

    waiting: int
    running: int


class Handle(Protocol):
    """Work that was submitted."""

    def cancel(self) -> None:
        """Ends the work as soon as the backend can; nothing happens where it has ended. Never waits."""


class Backend(Protocol):
    """Makes answers.

    Every work ends with exactly one `Finished` or `Failed`, also when it is cancelled: then before the next step of
    those beside it. No work's answer depends on the others.
    """

    def submit(self, work: Work, emit: Emit) -> Handle:
        """Takes work; never waits and never raises. What is wrong with it is told by `Failed`."""

    def load(self) -> Load:
        """What waits and what runs, without that which was cancelled."""

    def capacity(self) -> int:
        """How many works can run together."""

    def alive(self) -> bool:
        """Whether work is still being done; False after `close` and after an error from which it cannot recover."""

    def close(self) -> None:
        """Cancels all work and returns when none is being done."""
