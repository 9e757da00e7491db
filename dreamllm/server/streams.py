"""Answers to running work: whole, or as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from dreamllm.server.backend import Event
from dreamllm.server.errors import ApiError, ClientGoneError, json_response
from dreamllm.server.middleware import CLIENT_LEFT, Record
from dreamllm.server.service import Running
from dreamllm.server.watching import while_connected


async def answer_whole(running: Running, values: Awaitable[dict[str, Any]]) -> Response:
    """The answer once it is complete. The work ends with it, or with what goes wrong."""
    try:
        return json_response(await values)
    finally:
        running.close()


async def answer_with_events(
    running: Running, values: Callable[[Event], AsyncIterator[dict[str, Any]]], record: Record
) -> Response:
    """A stream of `values`, which take the work's first event: what fails before it still has a status of its own."""
    try:
        first = await running.next()
    except BaseException:
        running.close()
        raise
    return EventStream(running, values(first), record)


class EventStream(Response):
    """Sends `values` as they come. Ends their work when the client leaves or takes too long to read."""

    media_type = "text/event-stream"

    def __init__(self, running: Running, values: AsyncIterator[dict[str, Any]], record: Record) -> None:
        super().__init__(None, 200, {"x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._running = running
        self._values = values
        self._record = record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, asyncio.wait_for(self._send(send), self._running.seconds_left() + 1.0))
        except ClientGoneError:
            self._record.status, self._record.code = CLIENT_LEFT, "client_left"
        except asyncio.TimeoutError:  # it was the client that took so long
            self._record.code = "timeout"
        finally:
            self._running.close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for value in self._values:
                await send(_message(json.dumps(value)))
            await send(_message("[DONE]"))
        except ApiError as error:
            self._record.code = error.code
            await send(_message(json.dumps(error.body())))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _message(data: str) -> dict[str, Any]:
    return {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True}
