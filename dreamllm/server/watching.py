"""Awaiting something as long as the client stays."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from dreamllm.server.errors import ClientGoneError

Result = TypeVar("Result")


async def while_connected(receive: Receive, wanted: Coroutine[Any, Any, Result]) -> Result:
    """The result of `wanted`, which is cancelled when the client leaves: then raises `ClientGoneError`.

    The request's body must have been read.
    """
    task = asyncio.ensure_future(wanted)
    gone = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
