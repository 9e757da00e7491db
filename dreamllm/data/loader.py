"""Batches by number: batch n is a function of (seed, n), so a loader's whole state is one integer.

This is simpler than a stateful loader, and exact: to resume at batch n, ask for batch n. Nothing depends on the number
of worker processes, which torch's `DataLoader` runs and whose results it returns in order.
"""

from __future__ import annotations

import signal
from collections.abc import Generator
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dreamllm.data.mixture import Draw, Mixture
from dreamllm.data.preparation import Encoder, Prepared, prepare
from dreamllm.data.problems import BadSampleError, Problem, TooManyBadSamplesError
from dreamllm.data.seeds import uniform
from dreamllm.documents import PackedBatch, PictureSource, load_picture

FLIP_PROBABILITY = 0.5


@dataclass
class LoadedBatch:
    """Batch `number` and what was wrong with the samples drawn for it."""

    number: int
    batch: PackedBatch
    problems: list[Problem]

    def pin_memory(self) -> LoadedBatch:
        return replace(self, batch=self.batch.pin_memory())


@dataclass(frozen=True)
class LoaderSettings:
    """How batches are made.

    - `documents_per_batch`: documents packed into one batch.
    - `with_null`: append the empty prompt (needed for condition dropout).
    - `flip_targets`: mirror each picture to create with probability 1/2, drawn from (seed, position). The copy that is
      read is never mirrored. The original program does this; off here because captions may say left and right.
    - `max_consecutive_bad`: unusable samples in a row, of one reader, after which loading stops.
    """

    documents_per_batch: int
    with_null: bool = False
    flip_targets: bool = False
    max_consecutive_bad: int = 20

    def __post_init__(self) -> None:
        for name in ("documents_per_batch", "max_consecutive_bad"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


class Batches(Dataset):
    """`batches[n]`: the packed documents at positions n * D to (n + 1) * D - 1 of the mixture's order.

    A sample that cannot be used is replaced by the next usable one of its reader, and reported. Raises
    `TooManyBadSamplesError` when too many follow each other.
    """

    def __init__(self, mixture: Mixture, encoder: Encoder, settings: LoaderSettings) -> None:
        self.mixture, self.encoder, self.settings = mixture, encoder, settings

    def __getitem__(self, number: int) -> LoadedBatch:
        count = self.settings.documents_per_batch
        problems: list[Problem] = []
        prepared = []
        for position in range(number * count, (number + 1) * count):
            sample = self._usable(self.mixture.draw(position), problems)
            prepared.append(self._flip(sample, position) if self.settings.flip_targets else sample)
            problems.extend(sample.problems)
        batch = self.encoder.pack([sample.encoded for sample in prepared], with_null=self.settings.with_null)
        return LoadedBatch(number, batch, problems)

    def _usable(self, draw: Draw, problems: list[Problem]) -> Prepared:
        failures: list[str] = []
        for _ in range(self.settings.max_consecutive_bad):
            sample = self._attempt(draw)
            if isinstance(sample, Prepared):
                return sample
            problems.append(Problem(sample.reason, str(sample)))
            failures.append(f"  {sample.reason}: {sample}")
            draw = draw.following()
        shown = "\n".join(dict.fromkeys(failures[:5]))
        raise TooManyBadSamplesError(
            f"{len(failures)} samples of {draw.reader.name} in a row could not be used (max_consecutive_bad), "
            f"for example\n{shown}"
        )

    def _attempt(self, draw: Draw) -> Prepared | BadSampleError:
        try:
            return prepare(draw.document(), self.encoder)
        except BadSampleError as error:
            return error

    def _flip(self, sample: Prepared, position: int) -> Prepared:
        # Before the centre crop: mirroring commutes with it up to a pixel.
        targets: list[PictureSource] = [
            load_picture(picture).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            if uniform(self.mixture.seed, "flip", position, i) < FLIP_PROBABILITY
            else picture
            for i, picture in enumerate(sample.encoded.targets)
        ]
        return replace(sample, encoded=replace(sample.encoded, targets=targets))


def load_batches(
    batches: Batches, start: int, stop: int, workers: int = 0, pin_memory: bool = False
) -> Generator[LoadedBatch, None, None]:
    """Batches `start` to `stop - 1` in order, prepared in this process or by `workers` forked ones.

    Raises `TooManyBadSamplesError` as `batches` does, with an unaltered message.
    """
    loader = DataLoader(
        _Guarded(batches),
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_interrupts_to_the_parent,
    )
    for item in loader:
        if isinstance(item, TooManyBadSamplesError):
            raise item
        yield item


class _Guarded(Dataset):
    """Returns a loading failure as a value: raised in a worker, it would arrive wrapped in a traceback's text."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __getitem__(self, number: int) -> LoadedBatch | TooManyBadSamplesError:
        try:
            return self.batches[number]
        except TooManyBadSamplesError as error:
            return error


def _leave_interrupts_to_the_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
