"""Batches of a run: planned lane by lane from a few integers, made in any number of processes, the same from all.

A plan names the positions of the mixture's order that a batch holds; a batch is a function of its plan. Planning packs
by tokens reads texts and keeps documents back; making a batch decodes pictures. `load_steps` plans ahead in one process
and makes the batches in others (torch's `DataLoader`, which returns them in order), so that the state of a loader is
that of the last batch which was consumed, whatever was prefetched.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

from torch.utils.data import DataLoader, Dataset, IterableDataset

from dreamllm.data.latent_files import LatentCacheError
from dreamllm.data.latents import LatentCache
from dreamllm.data.mixture import Mixture
from dreamllm.data.packing import Held, choose
from dreamllm.data.plans import BatchPlan, LaneState, LoaderState
from dreamllm.data.preparation import Encoder, Prepared
from dreamllm.data.problems import Problem, TooManyBadSamplesError
from dreamllm.data.samples import Samples
from dreamllm.data.workers import START_METHOD, prepare_worker
from dreamllm.documents import PackedBatch
from dreamllm.documents.batch import null_sequence

LoadingError = TooManyBadSamplesError | LatentCacheError


@dataclass
class LoadedBatch:
    """The batch of `plan` and what was wrong with the samples drawn for it.

    Its pictures are bytes: `batch.to(device)` makes pixel values of them.
    """

    plan: BatchPlan
    batch: PackedBatch
    problems: list[Problem]

    @property
    def number(self) -> int:
        return self.plan.number

    @property
    def lane(self) -> int:
        return self.plan.lane

    @property
    def state(self) -> LaneState:
        """Where the batch's lane stands after it."""
        return self.plan.state

    def pin_memory(self) -> LoadedBatch:
        return replace(self, batch=self.batch.pin_memory())


@dataclass(frozen=True)
class LoaderSettings:
    """How batches are made: of a fixed number of documents, or of a fixed number of tokens. Exactly one is given.

    - `documents_per_batch`: documents packed into one batch, however long.
    - `tokens_per_batch`: the largest number of tokens of a batch, the empty prompt included. Documents are held back
      and chosen so that it is filled.
    - `look_ahead`: documents that are held back to choose from; more where they are too short to fill two batches.
    - `pictures_per_batch`: the largest number of pictures to create in such a batch, for they take memory beyond
      their tokens; None: any.
    - `with_null`: append the empty prompt (needed for condition dropout).
    - `flip_targets`: mirror each picture to create with probability 1/2, drawn from (seed, position). The copy that is
      read is never mirrored. The original program does this; off here because captions may say left and right.
    - `max_consecutive_bad`: unusable samples in a row, of one reader, after which loading stops.
    """

    documents_per_batch: int | None = None
    with_null: bool = False
    flip_targets: bool = False
    max_consecutive_bad: int = 20
    tokens_per_batch: int | None = None
    look_ahead: int = 64
    pictures_per_batch: int | None = None

    def __post_init__(self) -> None:
        if (self.documents_per_batch is None) == (self.tokens_per_batch is None):
            raise ValueError(
                "give either documents_per_batch or tokens_per_batch; given: "
                f"{self.documents_per_batch} and {self.tokens_per_batch}"
            )
        if self.tokens_per_batch is None and self.pictures_per_batch is not None:
            raise ValueError("pictures_per_batch limits batches of tokens_per_batch, which is not given")
        for name in ("documents_per_batch", "tokens_per_batch", "pictures_per_batch", "look_ahead"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.max_consecutive_bad < 1:
            raise ValueError(f"max_consecutive_bad must be at least 1, not {self.max_consecutive_bad}")


class Batches(Dataset):
    """The batches of `mixture`. A sample that cannot be used is replaced by the next usable one of its reader.

    With `documents_per_batch` D, batch n holds the documents at positions n * D to (n + 1) * D - 1 of the mixture's
    order and is also `batches[n]`. With `tokens_per_batch`, lane l of L reads the positions l, l + L, l + 2L, ... and
    each of its batches is filled as well as the documents that it holds back allow; one whose pictures turn out to be
    unreadable leaves a gap.

    With `latents`, the batches hold what the VAE made of their pictures to create instead of the pictures.

    Raises `ValueError` when `tokens_per_batch` does not hold the longest document, and when pictures are to be mirrored
    that the latent cache holds only as they are.
    """

    def __init__(
        self, mixture: Mixture, encoder: Encoder, settings: LoaderSettings, latents: LatentCache | None = None
    ) -> None:
        self.mixture, self.encoder, self.settings, self.latents = mixture, encoder, settings, latents
        if latents is not None and settings.flip_targets and not latents.identity.mirrored:
            raise ValueError(
                f"flip_targets mirrors pictures, but the latent cache {latents.folder} holds them only as they are; "
                "make one with --mirrored, or set flip_targets to false"
            )
        self.samples = Samples(
            mixture, encoder, settings.max_consecutive_bad, settings.flip_targets, settings.pictures_per_batch, latents
        )
        self.room = 0
        if settings.tokens_per_batch is not None:
            null = len(null_sequence(encoder.layout)) if settings.with_null else 0
            self.room = settings.tokens_per_batch - null
            if self.room < encoder.layout.max_length:
                raise ValueError(
                    f"tokens_per_batch {settings.tokens_per_batch} must hold a document of {encoder.layout.max_length} "
                    f"tokens (max_length)" + (f" and the empty prompt of {null}" if null else "")
                )

    # -- plans ------------------------------------------------------------

    def plans(self, lane: int, of: int, state: LaneState | None = None) -> Iterator[BatchPlan]:
        """The plans of lane `lane` of `of` lanes from `state` on, without end.

        Raises `TooManyBadSamplesError` as `load` does.
        """
        state = state or LaneState()
        return self._fixed_plans(lane, of, state) if self.room == 0 else self._packed_plans(lane, of, state)

    def _fixed_plans(self, lane: int, of: int, state: LaneState) -> Iterator[BatchPlan]:
        for step in itertools.count(state.step):
            yield self._fixed_plan(step * of + lane, lane, step)

    def _fixed_plan(self, number: int, lane: int, step: int) -> BatchPlan:
        count = self.settings.documents_per_batch
        assert count is not None
        positions = range(number * count, (number + 1) * count)
        return BatchPlan(number, lane, tuple(positions), LaneState(step + 1))

    def _packed_plans(self, lane: int, of: int, state: LaneState) -> Iterator[BatchPlan]:
        position = lane if state.position is None else state.position
        held = [self.samples.measure(waiting) for waiting in state.held]
        for step in itertools.count(state.step):
            while self._wants_more(held):
                held.append(self.samples.measure(position))
                position += of
            chosen = choose(held, self.room, self.settings.pictures_per_batch)
            positions = tuple(held[i].position for i in chosen)
            held = [item for i, item in enumerate(held) if i not in set(chosen)]
            after = LaneState(step + 1, position, tuple(item.position for item in held))
            yield BatchPlan(step * of + lane, lane, positions, after)

    def _wants_more(self, held: list[Held]) -> bool:
        return len(held) < self.settings.look_ahead or sum(item.tokens for item in held) < 2 * self.room

    # -- batches ------------------------------------------------------------

    def __getitem__(self, number: int) -> LoadedBatch:
        """Batch `number` of a fixed number of documents. Raises `TypeError` for batches of tokens."""
        if self.settings.documents_per_batch is None:
            raise TypeError("batches of tokens_per_batch follow from those before them; take them from load_steps")
        return self.load(self._fixed_plan(number, 0, number))

    def load(self, plan: BatchPlan) -> LoadedBatch:
        """Makes the batch of `plan`. Raises `TooManyBadSamplesError` when too many unusable samples follow another."""
        problems: list[Problem] = []
        prepared = self._fixed(plan, problems) if self.room == 0 else self._packed(plan, problems)
        for sample in prepared:
            problems.extend(sample.problems)
        moments = None if self.latents is None else [row for sample in prepared for row in sample.moments]
        encoded = [sample.encoded for sample in prepared]
        batch = self.encoder.pack(encoded, with_null=self.settings.with_null, moments=moments, as_bytes=True)
        return LoadedBatch(plan, batch, problems)

    def _fixed(self, plan: BatchPlan, problems: list[Problem]) -> list[Prepared]:
        return [self.samples.whole(self.mixture.draw(position), position, problems) for position in plan.positions]

    def _packed(self, plan: BatchPlan, problems: list[Problem]) -> list[Prepared]:
        texts = [self.samples.text(self.mixture.draw(position), problems) for position in plan.positions]
        room = self.room - sum(len(text.encoded) for text in texts)
        pictures = self.settings.pictures_per_batch or sys.maxsize
        pictures -= sum(len(text.encoded.targets) for text in texts)
        prepared = []
        for position, text in zip(plan.positions, texts, strict=True):
            sample = self.samples.pictures(text, position, problems)
            room += len(text.encoded)
            pictures += len(text.encoded.targets)
            if sample is None:
                continue
            length, drawn = len(sample.encoded), len(sample.encoded.targets)
            if length > room or drawn > pictures:
                problems.append(_does_not_fit(sample))
                continue
            room -= length
            pictures -= drawn
            prepared.append(sample)
        if not prepared:  # no picture of the whole batch could be read
            prepared.append(self.samples.whole(texts[0].draw.following(), plan.positions[0], problems))
        return prepared


def _does_not_fit(sample: Prepared) -> Problem:
    """Why a document takes more of its batch than was planned.

    Without a lost picture, text that was cut may fit again; and where the bytes of a picture cannot be read, which
    planning does not try, another document stands in.
    """
    lost = next((problem.message for problem in sample.problems if problem.reason == "lost_picture"), None)
    if lost is None:
        name = sample.encoded.name or "(unnamed)"
        return Problem("corrupt_image", f"{name} stands in for one that cannot be read and does not fit its batch")
    return Problem("corrupt_image", f"{lost}; without it the document does not fit its batch")


def load_steps(
    batches: Batches,
    lanes: range,
    of: int,
    start: LoaderState,
    workers: int = 0,
    pin_memory: bool = False,
    steps: int | None = None,
) -> Generator[list[LoadedBatch], None, None]:
    """The steps from `start` on: of each, the batches of the lanes `lanes` of `of`, in order.

    `start` holds at least the states of `lanes`. The batches are made in this process or by `workers` forked ones, and
    planned by one more where planning reads texts. `steps`: how many; None: without end. The state after a step is
    `state.after(loaded.plan for loaded in step)`.

    Raises `ValueError` for lanes outside range(of) and lanes that stand before different steps, and
    `TooManyBadSamplesError` as `batches` does, with an unaltered message, when the step that needs the samples is due.
    """
    if len(lanes) == 0 or lanes.step != 1 or lanes.start < 0 or lanes.stop > of:
        raise ValueError(f"lanes {lanes} must be a part of range({of})")
    start = start.of(lanes)
    plans = _Plans(batches, start, of, None if steps is None else start.step + steps)
    # A process of its own: tokenising texts would hold up the steps of this one.
    apart = DataLoader(
        plans, batch_size=None, num_workers=1, worker_init_fn=prepare_worker, multiprocessing_context=START_METHOD
    )
    loader = DataLoader(
        _Guarded(batches),
        batch_size=None,
        sampler=apart if workers and batches.room else plans,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=prepare_worker,
        multiprocessing_context=START_METHOD if workers else None,
    )
    step = []
    for item in loader:
        if not isinstance(item, LoadedBatch):
            raise item
        step.append(item)
        if len(step) == len(lanes):
            yield step
            step = []


class _Plans(IterableDataset):
    """The plans of all lanes of `start`, step by step, up to step `stop`; an error in planning ends them as a value."""

    def __init__(self, batches: Batches, start: LoaderState, of: int, stop: int | None) -> None:
        self.batches, self.start, self.of, self.stop = batches, start, of, stop

    def __iter__(self) -> Iterator[BatchPlan | LoadingError]:
        try:
            yield from self._interleaved()
        except TooManyBadSamplesError as error:
            yield error

    def _interleaved(self) -> Iterator[BatchPlan]:
        lanes = [self.batches.plans(lane, self.of, state) for lane, state in self.start.lanes.items()]
        first = self.start.step
        for _ in itertools.count() if self.stop is None else range(first, self.stop):
            for plans in lanes:
                yield next(plans)


class _Guarded(Dataset):
    """Returns a loading failure as a value: raised in a worker, it would arrive wrapped in a traceback's text."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __getitem__(self, plan: BatchPlan | LoadingError) -> LoadedBatch | LoadingError:
        if not isinstance(plan, BatchPlan):
            return plan
        try:
            return self.batches.load(plan)
        except (TooManyBadSamplesError, LatentCacheError) as error:
            return error
