"""The documents at the positions of a mixture's order, with others in the place of those that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from PIL import Image

from dreamllm.data.latents import LatentCache
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
    are a `TooManyBadSamplesError`. `max_pictures`: a document that creates more of them cannot be used. `latents`:
    where the posterior moments of pictures to create are looked up.
    """

    mixture: Mixture
    encoder: Encoder
    max_consecutive_bad: int
    flip_targets: bool = False
    max_pictures: int | None = None
    latents: LatentCache | None = None

    def measure(self, position: int) -> Held:
        """How long the document at `position` is. No picture is decoded, nor read where that would cost something."""
        attempt = lambda draw: self._attempt_text(draw, draw.outline())  # noqa: E731
        encoded = self._first(self.mixture.draw(position), [], attempt).encoded
        return Held(position, len(encoded), len(encoded.targets))

    def text(self, draw: Draw, problems: list[Problem]) -> TextSample:
        """The first document from `draw` on whose text can be used. What was wrong with others is added to `problems`.

        Raises `TooManyBadSamplesError`.
        """
        return self._first(draw, problems, lambda draw: self._attempt_text(draw, draw.document()))

    def whole(self, draw: Draw, position: int, problems: list[Problem]) -> Prepared:
        """The first document from `draw` on that can be used, with its pictures, for `position`. See `text`."""
        return self._first(
            draw, problems, lambda draw: self._pictures(self._attempt_text(draw, draw.document()), position)
        )

    def pictures(self, sample: TextSample, position: int, problems: list[Problem]) -> Prepared | None:
        """`sample` with its pictures, or None when they cannot be used."""
        try:
            return self._pictures(sample, position)
        except BadSampleError as error:
            problems.append(Problem(error.reason, str(error)))
            return None

    def _pictures(self, sample: TextSample, position: int) -> Prepared:
        if self.latents is None:
            prepared = prepare(sample.document, self.encoder, sample.encoded)
        else:
            latents = self.latents
            prepared = prepare(
                sample.document,
                self.encoder,
                sample.encoded,
                lambda number, source: latents.find(source, self._mirrored(position, number)),
            )
            if latents.missing == "error" and any(row is None for row in prepared.moments):
                raise latents.not_found(sample.document.name or "(unnamed)")
        # Mirrored before the centre crop: the two commute up to a pixel.
        targets: list[PictureSource] = [
            load_picture(source).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            if row is None and self._mirrored(position, number)
            else source
            for number, (source, row) in enumerate(zip(prepared.encoded.targets, prepared.moments, strict=True))
        ]
        return replace(prepared, encoded=replace(prepared.encoded, targets=targets))

    def _mirrored(self, position: int, number: int) -> bool:
        """Whether picture `number` to create at `position` is mirrored: with probability 1/2 under `flip_targets`."""
        return self.flip_targets and uniform(self.mixture.seed, "flip", position, number) < FLIP_PROBABILITY

    def _first(self, draw: Draw, problems: list[Problem], attempt: Callable[[Draw], Usable]) -> Usable:
        failures: list[str] = []
        for _ in range(len(draw.reader) + self.max_consecutive_bad):
            try:
                return attempt(draw)
            except BadSampleError as error:
                problem = Problem(error.reason, str(error))
                problems.append(problem)
                if not problem.filtered:
                    failures.append(f"  {error.reason}: {error}")
            if len(failures) == self.max_consecutive_bad:
                shown = "\n".join(dict.fromkeys(failures[:5]))
                raise TooManyBadSamplesError(
                    f"{len(failures)} samples of {draw.reader.name} in a row could not be used (max_consecutive_bad), "
                    f"for example\n{shown}"
                )
            draw = draw.following()
        raise TooManyBadSamplesError(f"the filters of {draw.reader.name} leave nothing: {problems[-1].message}")

    def _attempt_text(self, draw: Draw, document: Document) -> TextSample:
        encoded = encode_text(document, self.encoder)
        count = len(encoded.targets)
        if self.max_pictures is not None and count > self.max_pictures:
            raise BadSampleError(
                "too_many_pictures",
                f"{document.name or '(unnamed)'} creates {count} pictures; a batch holds at most {self.max_pictures} "
                "(pictures_per_batch)",
            )
        return TextSample(draw, document, encoded)
