"""Drawing for many requests: which pictures are denoised together, one step at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dreamkernels import GraphedCalls
from dreamllm.inference.denoising import Denoising, PictureInWork
from dreamllm.inference.drawing import DrawingOptions, Progress, build_scheduler, picture_seed, to_pil
from dreamllm.inference.loop import check_size
from dreamllm.inference.request import Preview, Request
from dreamllm.inference.selection import ClipJudge, best_candidate
from dreamllm.model import DreamLLM


@dataclass
class _Batch:
    """Pictures of the same options: candidate `number` of a request each."""

    denoising: Denoising
    owners: dict[PictureInWork, tuple[Request, int]]


@dataclass
class _Watched:
    """Denoising steps of the pictures that somebody wants to know of."""

    watcher: Progress
    done: int = 0
    total: int = 0
    counted: set[tuple[int, int]] = field(default_factory=set)  # requests and how many pictures they had before


class PictureWork:
    """The pictures in work. Those with the same options are denoised together, at most `DrawingOptions.batch_size` of
    them; each begins as soon as there is room, beside others that are at later steps."""

    def __init__(
        self, model: DreamLLM, null_condition: Callable[[str], Tensor], graphs: GraphedCalls | None = None
    ) -> None:
        self._model, self._null_condition, self._graphs = model, null_condition, graphs
        self._stream: Any = None
        self._judge: tuple[str, ClipJudge] | None = None  # the latest
        self._batches: dict[DrawingOptions, _Batch] = {}
        self._num_batches = 0  # ever begun
        self._watched: dict[int, _Watched] = {}

    def check(self, options: DrawingOptions) -> None:
        """Raises `ValueError` for options with which this model cannot draw, `FileNotFoundError` where no CLIP is."""
        build_scheduler(self._model.config.scheduler_config, options)
        check_size(self._model, options)
        if options.select is not None:
            self._judge_of(options.select)

    def _judge_of(self, folder: str) -> ClipJudge:
        if self._judge is None or self._judge[0] != folder:
            self._judge = folder, ClipJudge(folder, self._model.device)
        return self._judge[1]

    def advance(self, running: Sequence[Request]) -> None:
        """Begins pictures where there is room, then takes one denoising step of all in work.

        On CUDA in a stream of its own: the host goes on, and the language model writes the other requests' next tokens
        while the UNet computes. On a CPU both would share the same cores, so they take turns.
        """
        with self._own_stream():
            self._advance(running)

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        device = self._model.device
        if device.type != "cuda":
            yield
            return
        if self._stream is None or self._stream.device != device:
            self._stream = torch.cuda.Stream(device)
        main, before = torch.cuda.current_stream(device), self._num_batches
        self._stream.wait_stream(main)  # which makes the conditions
        with torch.cuda.stream(self._stream):
            yield
        if self._num_batches > before:
            main.wait_stream(self._stream)  # which may have made a null condition that is kept

    def _advance(self, running: Sequence[Request]) -> None:
        drawing = [request for request in running if request.state == "drawing"]
        for request in drawing:
            self._begin(request)
        for batch in self._batches.values():
            finished = batch.denoising.step()
            self._tell(batch, finished)
            self._finish(batch, finished)
        self.remove_done()
        if not any(request.state == "drawing" for request in drawing):
            self._watched.clear()

    def remove_done(self) -> None:
        """Gives up pictures that nobody wants any more."""
        for options, batch in list(self._batches.items()):
            unwanted = [picture for picture, (request, _) in batch.owners.items() if request.done]
            batch.denoising.leave(unwanted)
            for picture in unwanted:
                del batch.owners[picture]
            if not batch.owners:
                del self._batches[options]

    def forget(self) -> None:
        """Gives up everything."""
        self._batches.clear()
        self._watched.clear()

    def _begin(self, request: Request) -> None:
        """Begins what there is room for of a request's candidates that have not begun."""
        left = request.drawing.candidates - request.num_begun
        if not left:
            return
        batch = self._batch_of(replace(request.drawing, candidates=1, select=None))
        if request.progress is not None:
            watched = self._watched.setdefault(id(request.progress), _Watched(request.progress))
            if (id(request), request.num_drawn) not in watched.counted:
                watched.counted.add((id(request), request.num_drawn))
                watched.total += left * batch.denoising.steps
        count = min(left, request.drawing.batch_size - len(batch.owners))
        if count > 0 and request.condition is not None:
            numbers = range(request.num_begun, request.num_begun + count)
            first = request.num_drawn * request.drawing.candidates // request.num_kept
            seeds = [picture_seed(request.seed, first + number) for number in numbers]
            if request.condition.is_cuda:  # its memory came from another stream, which must not reuse it yet
                request.condition.record_stream(torch.cuda.current_stream(request.condition.device))
            joined = batch.denoising.join(request.condition, seeds)
            batch.owners |= {picture: (request, number) for picture, number in zip(joined, numbers, strict=True)}
            request.num_begun += count

    def _batch_of(self, options: DrawingOptions) -> _Batch:
        if options not in self._batches:
            null = self._null_condition(options.negative_prompt) if options.guided else None
            self._num_batches += 1
            self._batches[options] = _Batch(Denoising(self._model, null, options, self._graphs), {})
        return self._batches[options]

    def _tell(self, batch: _Batch, finished: Iterable[PictureInWork]) -> None:
        """Tells watchers of the step and shows previews."""
        for request, _ in batch.owners.values():
            if request.progress is not None:
                self._watched[id(request.progress)].done += 1
        for key in {id(request.progress) for request, _ in batch.owners.values() if request.progress is not None}:
            watched = self._watched[key]
            watched.watcher(watched.done, watched.total)
        done = set(map(id, finished))
        due = [
            (picture, request, number)
            for picture, (request, number) in batch.owners.items()
            if request.preview_every and not picture.steps_done % request.preview_every
            if id(picture) not in done and not request.done
        ]
        if due:
            shown = batch.denoising.decode([picture for picture, *_ in due])
            for image, (picture, request, number) in zip(shown, due, strict=True):
                preview = Preview(to_pil(image), picture.steps_done, batch.denoising.steps, number)
                request.attempt(request.tell, preview)

    def _finish(self, batch: _Batch, finished: Sequence[PictureInWork]) -> None:
        if not finished:
            return
        for image, picture in zip(batch.denoising.decode(finished), finished, strict=True):
            request, number = batch.owners.pop(picture)
            if request.done:
                continue
            request.candidates[number] = to_pil(image)
            if all(candidate is not None for candidate in request.candidates):
                request.attempt(self._hand_over, request)

    def _hand_over(self, request: Request) -> None:
        drawn = [candidate for candidate in request.candidates if candidate is not None]
        if request.drawing.select is not None:
            agreement = self._judge_of(request.drawing.select).agreement(drawn, [request.picture_text])
            request.candidates = [drawn[best_candidate(agreement)]]
        request.take_pictures()
