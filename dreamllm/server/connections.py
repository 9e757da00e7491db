"""A connection that waits for its client only so long: for a request's head, and for an answer to be read."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from dreamllm.server.limits import Limits


class Connection(H11Protocol):
    """uvicorn's connection within `Limits`. It has timers of its own only between requests; those of a body and of a
    whole request belong to the application."""

    def __init__(self, limits: Limits, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._head_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            transport.abort()
            return
        transport.set_write_buffer_limits(high=0)  # writing is paused, and counted, while anything is unsent
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._send_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_head()

    def _await_head(self) -> None:
        """Begins to count when a head is what comes next, and goes on, however its bytes trickle, until it is there.

        Between requests nothing is counted before a first byte: that is uvicorn's `timeout_keep_alive`.
        """
        awaited = self.cycle is None or self.cycle.response_complete
        if awaited and self._head_timer is None:
            self._head_timer = self.loop.call_later(self._limits.head_seconds, self.transport.close)
        elif not awaited and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def pause_writing(self) -> None:
        super().pause_writing()
        # Not close, which would wait until everything is sent.
        self._send_timer = self.loop.call_later(self._limits.send_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None
