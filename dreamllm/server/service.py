"""The server's state: places for requests, what runs for them, and whether it is stopping."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from dreamllm.documents import ChatTemplate
from dreamllm.inference import DrawingOptions
from dreamllm.server.backend import Backend, Event, Failed, Started, Work
from dreamllm.server.errors import ApiError, of_failure, too_late
from dreamllm.server.fetching import Fetcher
from dreamllm.server.limits import Limits
from dreamllm.server.metrics import Metrics

Result = TypeVar("Result")
_PARSERS = 2
_FETCHERS = 8
_LONGEST_RETRY = 60


@dataclass(frozen=True)
class Served:
    """The model as clients see it. `drawing`: what it recommends; `size`: side of its pictures in pixels."""

    name: str
    template: ChatTemplate
    drawing: DrawingOptions
    size: int


class Service:
    """What all requests share. Lives in one event loop.

    `max_queue`: requests that have a place beside as many as the backend runs together.
    """

    def __init__(
        self,
        backend: Backend,
        served: Served,
        limits: Limits,
        max_queue: int = 64,
        fetcher: Fetcher | None = None,
        log_prompts: bool = False,
    ) -> None:
        if max_queue < 0:
            raise ValueError(f"max_queue must be at least 0, not {max_queue}")
        self.backend = backend
        self.served = served
        self.limits = limits
        self.fetcher = fetcher
        self.log_prompts = log_prompts
        self.metrics = Metrics(backend)
        self.draining = False
        self.started = int(time.time())
        self._places = backend.capacity() + max_queue
        self._taken = 0
        self._emptied: asyncio.Event | None = None
        self._running: set[Running] = set()
        self._typical_seconds = 1.0
        self._parsers = ThreadPoolExecutor(_PARSERS, "dreamllm-parse")
        self._fetchers = ThreadPoolExecutor(_FETCHERS, "dreamllm-fetch")

    # -- places --------------------------------------------------------------------------------------------------------

    def take_place(self) -> None:
        """A place for one request, to be given back. Raises `ApiError` 429 where all are taken."""
        if self._taken >= self._places:
            rounds = self._taken / self.backend.capacity()
            seconds = min(_LONGEST_RETRY, max(1, math.ceil(rounds * self._typical_seconds)))
            raise ApiError(
                429,
                f"the server is busy with {self._taken} requests; try again in {seconds} s",
                "queue_full",
                headers={"retry-after": str(seconds)},
            )
        self._taken += 1

    def give_place(self, seconds: float) -> None:
        """A request of a place has ended after so many seconds."""
        self._typical_seconds += 0.1 * (seconds - self._typical_seconds)
        self._taken -= 1
        if self._taken == 0 and self._emptied is not None:
            self._emptied.set()

    # -- work ----------------------------------------------------------------------------------------------------------

    async def parsed(self, function: Callable[[], Result]) -> Result:
        """The result of `function`, computed beside the event loop by one of few threads."""
        return await asyncio.get_running_loop().run_in_executor(self._parsers, function)

    async def fetched(self, function: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._fetchers, function)

    def submit(self, work: Work, arrived: float) -> Running:
        """Starts work for a request that arrived at a time of `time.monotonic`."""
        return Running(self, work, arrived)

    # -- the end -------------------------------------------------------------------------------------------------------

    async def drain(self) -> None:
        """Refuses new requests and waits for those that have a place; after `drain_seconds` their work is cancelled."""
        self.draining = True
        self._emptied = asyncio.Event()
        if self._taken:
            try:
                await asyncio.wait_for(self._emptied.wait(), self.limits.drain_seconds)
            except asyncio.TimeoutError:
                for running in list(self._running):
                    running.abort()

    def close(self) -> None:
        """Ends all work. Call when no request is being answered."""
        self._parsers.shutdown(cancel_futures=True)
        self._fetchers.shutdown(wait=False, cancel_futures=True)
        self.backend.close()


class Running:
    """Work as its request sees it: events to await until a deadline."""

    def __init__(self, service: Service, work: Work, arrived: float) -> None:
        self._service = service
        self._arrived = arrived
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        # Not asyncio.wait_for: before Python 3.12 it may swallow that the task which awaits an event is cancelled.
        self._deadline = self._loop.call_later(self.seconds_left(), self._events.put_nowait, None)
        service._running.add(self)
        self._handle = service.backend.submit(work, self._from_thread)

    def seconds_left(self) -> float:
        return max(0.0, self._arrived + self._service.limits.request_seconds - time.monotonic())

    async def next(self) -> Event:
        """The next event but `Started`. Raises `ApiError` for work that failed, and 504 at the deadline."""
        while True:
            event = await self._events.get()
            if event is None:
                raise too_late(self._service.limits.request_seconds)
            if isinstance(event, Failed):
                raise of_failure(event)
            if not isinstance(event, Started):
                return event
            self._service.metrics.began(time.monotonic() - self._arrived)

    def close(self) -> None:
        """Ends the work where it has not ended; nobody awaits its events any more."""
        self._handle.cancel()
        self._deadline.cancel()
        self._service._running.discard(self)

    def abort(self) -> None:
        """Ends the work because the server stops."""
        self._handle.cancel()
        self._events.put_nowait(Failed("the server is shutting down", "closed"))

    def _from_thread(self, event: Event) -> None:
        with suppress(RuntimeError):  # the loop was closed: nobody waits
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
