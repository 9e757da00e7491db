"""The documents at the positions of a mixture's order, with others in the place of those that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from PIL import Image

from dreamllm.data.mixture import Draw, Mixture
from dreamllm.data.packing import Held
from dreamllm.data.preparation import Encoder, Prepared, encode_text, prepare
from dreamllm.data.problems import BadSampleError, Problem, TooManyBadSamplesError
from dreamllm.data.seeds import uniform
from dreamllm.documents import Document, EncodedDocument, PictureSource, load_picture

FLIP_PROBABILITY = 0.5
Usable = TypeVar("Usable")


@dataclass(frozen=True)
class TextSample:
    """A document whose text is encoded and whose pictures have not been looked at."""

    draw: Draw
    document: Document
    encoded: EncodedDocument


@dataclass(frozen=True)
class Samples:
    """What stands at a position of `mixture`, as a function of the position alone.

    A sample that cannot be used gives way to the next usable one of its reader; `max_consecutive_bad` of them in a row
    are a `TooManyBadSamplesError`. `max_pictures`: a document that creates more of them cannot be used.
    """

    mixture: Mixture
    encoder: Encoder
    max_consecutive_bad: int
    flip_targets: bool = False
    max_pictures: int | None = None

    def measure(self, position: int) -> Held:
        """How long the document at `position` is. No picture is decoded."""
        encoded = self.text(self.mixture.draw(position), []).encoded
        return Held(position, len(encoded), len(encoded.targets))

    def text(self, draw: Draw, problems: list[Problem]) -> TextSample:
        """The first document from `draw` on whose text can be used. What was wrong with others is added to `problems`.

        Raises `TooManyBadSamplesError`.
        """
        return self._first(draw, problems, self._attempt_text)

    def whole(self, draw: Draw, problems: list[Problem]) -> Prepared:
        """The first document from `draw` on that can be used, with its pictures. See `text`."""
        return self._first(draw, problems, lambda draw: self._pictures(self._attempt_text(draw)))

    def pictures(self, sample: TextSample, problems: list[Problem]) -> Prepared | None:
        """`sample` with its pictures, or None when they cannot be used."""
        try:
            prepared = self._pictures(sample)
        except BadSampleError as error:
            problems.append(Problem(error.reason, str(error)))
            return None
        return prepared

    def flipped(self, prepared: Prepared, position: int) -> Prepared:
        """With `flip_targets`, mirrors each picture to create with probability 1/2, drawn from (seed, position)."""
        if not self.flip_targets:
            return prepared
        # Before the centre crop: mirroring commutes with it up to a pixel.
        targets: list[PictureSource] = [
            load_picture(picture).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            if uniform(self.mixture.seed, "flip", position, i) < FLIP_PROBABILITY
            else picture
            for i, picture in enumerate(prepared.encoded.targets)
        ]
        return replace(prepared, encoded=replace(prepared.encoded, targets=targets))

    def _first(self, draw: Draw, problems: list[Problem], attempt: Callable[[Draw], Usable]) -> Usable:
        failures: list[str] = []
        for _ in range(self.max_consecutive_bad):
            try:
                return attempt(draw)
            except BadSampleError as error:
                problems.append(Problem(error.reason, str(error)))
                failures.append(f"  {error.reason}: {error}")
            draw = draw.following()
        shown = "\n".join(dict.fromkeys(failures[:5]))
        raise TooManyBadSamplesError(
            f"{len(failures)} samples of {draw.reader.name} in a row could not be used (max_consecutive_bad), "
            f"for example\n{shown}"
        )

    def _attempt_text(self, draw: Draw) -> TextSample:
        document = draw.document()
        encoded = encode_text(document, self.encoder)
        count = len(encoded.targets)
        if self.max_pictures is not None and count > self.max_pictures:
            raise BadSampleError(
                "too_many_pictures",
                f"{document.name or '(unnamed)'} creates {count} pictures; a batch holds at most {self.max_pictures} "
                "(pictures_per_batch)",
            )
        return TextSample(draw, document, encoded)

    def _pictures(self, sample: TextSample) -> Prepared:
        return prepare(sample.document, self.encoder, sample.encoded)
