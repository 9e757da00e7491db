"""A backend on `Engine`: requests join and leave between its steps and are told of piece by piece."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from dreamllm.inference import Engine, NewPicture, NewText, Preview, Request
from dreamllm.inference.request import Event as EngineEvent
from dreamllm.server.backend import (
    Emit,
    Event,
    Failed,
    Finished,
    Load,
    PictureDrawn,
    PictureStep,
    Started,
    TextPiece,
    Usage,
    Work,
)

_log = logging.getLogger(__name__)

Result = TypeVar("Result")


class _Job:
    """One work on its way."""

    def __init__(self, backend: EngineBackend, work: Work, emit: Emit) -> None:
        self._backend = backend
        self._emit = emit
        self._started = False
        self._ended = False
        self.work = work
        self.request: Request | None = None
        self.cancelled = False

    def cancel(self) -> None:
        self._backend._cancel(self)

    @property
    def waits(self) -> bool:
        return self.request is None or self.request.state == "waiting"

    def listen(self, event: EngineEvent) -> None:
        """Takes the engine's events."""
        self.start()
        if isinstance(event, NewText):
            self.tell(TextPiece(event.text))
        elif isinstance(event, NewPicture):
            self.tell(PictureDrawn(event.picture))
        elif isinstance(event, Preview):
            self.tell(PictureStep(event.picture, event.step, event.steps, event.candidate))

    def start(self) -> None:
        if not self._started:
            self._started = True
            self.tell(Started())

    def tell(self, event: Event) -> None:
        if not self._ended:
            self._ended = isinstance(event, Finished | Failed)
            self._emit(event)

    def usage(self) -> Usage:
        request = self.request
        if request is None:
            return Usage()
        return Usage(len(request.encoded), len(request.chosen), request.num_drawn)


class EngineBackend:
    """A `Backend` on one engine, which nobody else may use meanwhile."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._changed = threading.Condition()
        self._arrived: list[_Job] = []
        self._active: list[_Job] = []
        self._calls: list[tuple[Callable[[Engine], Any], Future[Any]]] = []
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="dreamllm-engine", daemon=True)
        self._thread.start()

    # -- what the server calls -----------------------------------------------------------------------------------------

    def submit(self, work: Work, emit: Emit) -> _Job:
        job = _Job(self, work, emit)
        with self._changed:
            if not self._closed:
                self._arrived.append(job)
                self._changed.notify_all()
                return job
        job.tell(Failed("the server is shutting down", "closed"))
        return job

    def call(self, function: Callable[[Engine], Result]) -> Future[Result]:
        """Calls a function with the engine between two of its steps; requests wait for it so long. A call that is
        cancelled before it begins is never made."""
        future: Future[Result] = Future()
        with self._changed:
            if self._closed:
                future.cancel()
            else:
                self._calls.append((function, future))
                self._changed.notify_all()
        return future

    def load(self) -> Load:
        with self._changed:
            jobs = [job for job in (*self._arrived, *self._active) if not job.cancelled]
        waiting = sum(job.waits for job in jobs)
        return Load(waiting, len(jobs) - waiting)

    def capacity(self) -> int:
        return self._engine.batch_size

    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    def close(self) -> None:
        with self._changed:
            self._closed = True
            for job in (*self._arrived, *self._active):
                job.cancelled = True
            for _, future in self._calls:
                future.cancel()
            self._changed.notify_all()
        self._thread.join()

    def _cancel(self, job: _Job) -> None:
        with self._changed:
            job.cancelled = True
            self._changed.notify_all()

    # -- the worker ----------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._arrived or self._active or self._calls or self._closed)
                calls, self._calls = self._calls, []
                arrived, self._arrived = self._arrived, []
                self._active += arrived
                active = list(self._active)
                closed = self._closed
            for job in arrived:
                self._begin(job)
            for job in active:
                if job.cancelled and job.request is not None:
                    job.request.cancel()
            self._step(active)
            for function, future in calls:
                self._make(function, future)
            left = [job for job in active if not self._ended(job)]
            with self._changed:
                self._active = left
            if closed:
                return

    def _make(self, function: Callable[[Engine], Any], future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function(self._engine))
        except BaseException as error:
            future.set_exception(error)

    def _begin(self, job: _Job) -> None:
        """Gives the engine a work. What it refuses has no request then."""
        if job.cancelled:
            job.tell(Finished("cancelled"))
            return
        work = job.work
        try:
            options = work.options
            job.request = self._engine.submit(work.prompt, options, options.seed, job.listen, work.preview_every)
        except ValueError as error:
            job.tell(Failed(str(error), "request"))
        except Exception:
            self._fail(job)

    def _step(self, active: list[_Job]) -> None:
        """One step of the engine. What an error concerned has ended with it; if it was nothing, everything ends."""
        try:
            self._engine.step()
        except Exception:
            _log.exception("a step of the engine failed")
            requests = [job.request for job in active if job.request is not None]
            if not any(request.done for request in requests):
                for request in requests:
                    request.fail(RuntimeError("the engine cannot go on"))
                with suppress(Exception):
                    self._engine.step()  # which lets go of what has ended

    def _ended(self, job: _Job) -> bool:
        """Whether a work has ended; if so, that has been told."""
        request = job.request
        if request is None:
            return True
        if not job.waits:
            job.start()
        if not request.done:
            return False
        if isinstance(request.error, ValueError):
            job.tell(Failed(str(request.error), "request"))
        elif request.error is not None:
            self._fail(job, request.error)
        else:
            job.tell(self._finished(job, request))
        return True

    def _finished(self, job: _Job, request: Request) -> Finished:
        try:
            answer = request.answer
        except RuntimeError:  # it was cancelled before its end
            return Finished("cancelled", job.usage())
        return Finished(answer.stopped, job.usage(), answer.document)

    def _fail(self, job: _Job, error: BaseException | None = None) -> None:
        _log.error("an answer failed", exc_info=error or True)
        job.tell(Failed("the server failed to make an answer", "server"))
