"""A backend on `Engine.answers`: waiting work of equal options is answered together, batch after batch.

The engine hands over whole answers, so an answer's events come together at its end. Cancelled work leaves the queue at
once; a batch that runs is given up at the next token or denoising step after the last of its works was cancelled.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from PIL import Image

from dreamllm.documents import Picture, Text
from dreamllm.inference import Answer, Engine, GenerationOptions
from dreamllm.server.backend import (
    Emit,
    Event,
    Failed,
    Finished,
    Load,
    PictureDrawn,
    Started,
    TextPiece,
    Usage,
    Work,
)

_log = logging.getLogger(__name__)


class _AllCancelledError(Exception):
    """Leaves the engine when nobody waits for any answer of the batch."""


class _Job:
    """One work on its way; `cancelled` and `ended` change under the backend's lock."""

    def __init__(self, backend: BatchBackend, work: Work, emit: Emit) -> None:
        self._backend = backend
        self._emit = emit
        self.work = work
        self.prompt_tokens = 0
        self.cancelled = False
        self.ended = False

    def cancel(self) -> None:
        self._backend._cancel(self)

    def tell(self, event: Event) -> None:
        if not self.ended:
            self.ended = isinstance(event, Finished | Failed)
            self._emit(event)

    def give_up(self) -> None:
        self.tell(Finished("cancelled", Usage(self.prompt_tokens)))


class BatchBackend:
    """A `Backend` on one engine, which nobody else may use meanwhile. `max_batch`: works that are answered together."""

    def __init__(self, engine: Engine, max_batch: int = 8) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, not {max_batch}")
        self._engine = engine
        self._max_batch = max_batch
        self._changed = threading.Condition(threading.RLock())
        self._waiting: deque[_Job] = deque()
        self._running: list[_Job] = []
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="dreamllm-batches", daemon=True)
        self._thread.start()

    # -- what the server calls -----------------------------------------------------------------------------------------

    def submit(self, work: Work, emit: Emit) -> _Job:
        job = _Job(self, work, emit)
        with self._changed:
            if self._closed:
                job.tell(Failed("the server is shutting down", "closed"))
            else:
                self._waiting.append(job)
                self._changed.notify_all()
        return job

    def load(self) -> Load:
        with self._changed:
            return Load(len(self._waiting), sum(not (job.ended or job.cancelled) for job in self._running))

    def capacity(self) -> int:
        return self._max_batch

    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    def close(self) -> None:
        with self._changed:
            self._closed = True
            for job in [*self._waiting, *self._running]:
                job.cancel()
            self._changed.notify_all()
        self._thread.join()

    def _cancel(self, job: _Job) -> None:
        with self._changed:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
                job.give_up()

    # -- the worker ----------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                self._running = []
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                self._running = self._next_batch()
            batch = [job for job in self._running if self._begin(job)]
            if batch:
                self._answer(batch)

    def _next_batch(self) -> list[_Job]:
        """The work that has waited longest, and the next ones with the same options."""
        options = _shared(self._waiting[0])
        batch = [job for job in self._waiting if _shared(job) == options][: self._max_batch]
        for job in batch:
            self._waiting.remove(job)
        return batch

    def _begin(self, job: _Job) -> bool:
        """Tells that the work has begun. False where there is no more to do."""
        job.tell(Started())
        if job.cancelled:
            job.give_up()
            return False
        try:
            job.prompt_tokens = len(self._engine.processor.encode(job.work.prompt))
        except ValueError as error:
            job.tell(Failed(str(error), "request"))
            return False
        except Exception:
            self._fail([job])
            return False
        return True

    def _answer(self, batch: list[_Job]) -> None:
        def check(*_: object) -> None:
            if all(job.cancelled for job in batch):
                raise _AllCancelledError

        prompts = [job.work.prompt for job in batch]
        seeds = [job.work.options.seed for job in batch]
        # Called before every token, as `progress` is at every denoising step.
        hook = self._engine.model.get_output_embeddings().register_forward_pre_hook(check)
        try:
            answers = self._engine.answers(prompts, batch[0].work.options, seeds, check)
        except _AllCancelledError:
            for job in batch:
                job.give_up()
        except ValueError as error:
            if len(batch) == 1:
                batch[0].tell(Failed(str(error), "request"))
            else:  # one of them is to blame, and the message does not say which
                for job in batch:
                    self._answer([job])
        except Exception:
            self._fail(batch)
        else:
            for job, answer in zip(batch, answers, strict=True):
                self._deliver(job, answer)
        finally:
            hook.remove()

    def _fail(self, batch: Sequence[_Job]) -> None:
        _log.exception("an answer failed")
        for job in batch:
            job.tell(Failed("the server failed to make an answer", "server"))

    def _deliver(self, job: _Job, answer: Answer) -> None:
        for part in answer.document.parts:
            if isinstance(part, Text):
                job.tell(TextPiece(part.text))
            elif isinstance(part, Picture) and isinstance(part.source, Image.Image):
                job.tell(PictureDrawn(part.source))
        usage = Usage(job.prompt_tokens, len(answer.token_ids), len(answer.pictures))
        job.tell(Finished("cancelled" if job.cancelled else answer.stopped, usage))


def _shared(job: _Job) -> GenerationOptions:
    """The options without the seed, which each work of a batch has for itself."""
    return replace(job.work.options, seed=0)
