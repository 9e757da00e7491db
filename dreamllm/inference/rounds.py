"""Drawing for many requests: when a round begins, which pictures are denoised together, one step at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dreamllm.inference.drawing import DrawingOptions, Progress, build_scheduler, picture_seed, to_pil
from dreamllm.inference.request import Preview, Request
from dreamllm.inference.sampler import Denoising, check_size
from dreamllm.model import DreamLLM


@dataclass
class _Batch:
    """Pictures that are denoised together: candidate `number` of a request each. It is batch `index` of `batches`."""

    pictures: list[tuple[Request, int]]
    index: int
    batches: int
    denoising: Denoising | None = None

    @property
    def alive(self) -> bool:
        return any(not request.done for request, _ in self.pictures)

    @property
    def watchers(self) -> list[Progress]:
        """Those who want to know of steps, each once."""
        return list({id(r.progress): r.progress for r, _ in self.pictures if r.progress is not None}.values())


class Rounds:
    """The pictures in work. A round takes all that wait for pictures with the same options, in batches of
    `DrawingOptions.batch_size`, one batch after the other."""

    def __init__(self, model: DreamLLM, null_condition: Callable[[str], Tensor], patience: int) -> None:
        self._model, self._null_condition, self._patience = model, null_condition, patience
        self._batches: list[_Batch] = []
        self._waited = 0

    def check(self, options: DrawingOptions) -> None:
        """Raises `ValueError` for options with which this model cannot draw."""
        build_scheduler(self._model.config.scheduler_config, options)
        check_size(self._model, options)

    def advance(self, running: Sequence[Request]) -> None:
        """One denoising step of the batch in work, if there is one or it is time to begin one."""
        if not self._batches:
            self._begin(running)
        if not self._batches:
            return
        batch = self._batches[0]
        if batch.denoising is None:
            batch.denoising = self._denoising(batch)
        batch.denoising.step()
        self._tell(batch, batch.denoising)
        if batch.denoising.done:
            self._batches.pop(0)
            self._finish(batch, batch.denoising)

    def remove_done(self) -> None:
        """Gives up batches that nobody wants any more."""
        self._batches = [batch for batch in self._batches if batch.alive]

    def forget(self) -> None:
        """Gives up everything."""
        self._batches.clear()

    def _begin(self, running: Sequence[Request]) -> None:
        waiting = [request for request in running if request.state == "drawing"]
        if not waiting:
            self._waited = 0
            return
        options = waiting[0].drawing
        same = [request for request in waiting if request.drawing == options]
        may_join = any(request.may_draw for request in running if request.state not in ("drawing", "done"))
        enough = len(same) * options.candidates >= options.batch_size
        self._waited += 1
        if may_join and not enough and self._waited < self._patience:
            return
        self._waited = 0
        pictures = [(request, number) for request in same for number in range(options.candidates)]
        size = options.batch_size
        starts = range(0, len(pictures), size)
        self._batches = [_Batch(pictures[s : s + size], i, len(starts)) for i, s in enumerate(starts)]

    def _denoising(self, batch: _Batch) -> Denoising:
        requests = [request for request, _ in batch.pictures]
        options = requests[0].drawing
        conditions = [request.condition for request in requests if request.condition is not None]
        null = self._null_condition(options.negative_prompt) if options.guided else None
        seeds = [picture_seed(request.seed, request.num_drawn + number) for request, number in batch.pictures]
        return Denoising(self._model, torch.stack(conditions), null, options, seeds)

    def _tell(self, batch: _Batch, denoising: Denoising) -> None:
        done, steps = denoising.steps_done, denoising.steps
        for watcher in batch.watchers:
            watcher(batch.index * steps + done, batch.batches * steps)
        due = [
            (row, request)
            for row, (request, _) in enumerate(batch.pictures)
            if request.preview_every and not done % request.preview_every and done < steps and not request.done
        ]
        if due:
            pictures = denoising.pictures()
            for row, request in due:
                request.attempt(request.tell, Preview(to_pil(pictures[row]), done, steps))

    def _finish(self, batch: _Batch, denoising: Denoising) -> None:
        for (request, number), picture in zip(batch.pictures, denoising.pictures(), strict=True):
            if request.done:
                continue
            request.candidates[number] = to_pil(picture)
            if all(candidate is not None for candidate in request.candidates):
                request.attempt(request.take_pictures)
