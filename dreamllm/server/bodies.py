"""Reading a request's JSON within limits."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import suppress
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from dreamllm.server.errors import ApiError, ClientGoneError, bad_request
from dreamllm.server.limits import Limits

_DISCARD_SECONDS = 5.0
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body of a request that says it is JSON. Raises `ApiError` for one too long, too slow or encoded."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send JSON with the header Content-Type: application/json", "unsupported_media_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "send the body without content-encoding", "unsupported_media_type")
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared) > limits.max_body_bytes:
        raise _too_large(limits)
    try:
        return await asyncio.wait_for(_read(request, limits), limits.body_seconds)
    except asyncio.TimeoutError:
        message = f"the body did not arrive within {limits.body_seconds} seconds"
        raise ApiError(408, message, "timeout", headers={"connection": "close"}) from None
    except ClientDisconnect:
        raise ClientGoneError from None


async def _read(request: Request, limits: Limits) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limits.max_body_bytes:
            raise _too_large(limits)
    return bytes(body)


def _too_large(limits: Limits) -> ApiError:
    message = f"the body has more than {limits.max_body_bytes} bytes, the limit of this server"
    return ApiError(413, message, "body_too_large", headers={"connection": "close"})


def parse_json(body: bytes) -> Any:
    """Raises `ApiError` for what is not JSON, or is nested too deeply."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
        if _SURROGATE.search(body):
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # raises for half of a pair, which is no text
        return value
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise bad_request(f"the body is not valid JSON: {reason}", code="invalid_json") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


async def discard_body(receive: Receive, limits: Limits) -> None:
    """Reads on for a moment before a refusal: a client that is still sending would see a reset, not the answer."""
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(_discard(receive, limits.max_body_bytes), _DISCARD_SECONDS)


async def _discard(receive: Receive, most: int) -> None:
    while most > 0:
        message = await receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            return
        most -= len(message.get("body", b""))
