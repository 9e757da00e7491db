"""Around every request: its id, its line in the log, keys, places, and errors as JSON."""

from __future__ import annotations

import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dreamllm.server.backend import Usage
from dreamllm.server.bodies import discard_body
from dreamllm.server.errors import ApiError, shutting_down
from dreamllm.server.keys import ApiKeys
from dreamllm.server.limits import Limits
from dreamllm.server.logs import log_event
from dreamllm.server.service import Service

_log = logging.getLogger(__name__)
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
CLIENT_LEFT = 499
"""In logs and metrics, where a client left before its answer (as nginx counts them). It is never sent."""


@dataclass
class Record:
    """What becomes known of a request while it is answered."""

    id: str
    arrived: float = field(default_factory=time.monotonic)
    status: int = 0
    code: str | None = None
    body_read: bool = False
    usage: Usage | None = None
    prompt: Any = None


def record_of(scope: Scope) -> Record:
    return scope["dreamllm.record"]


class Observed:
    """Gives each request an id, counts and logs it, and answers what nobody caught with an error in OpenAI's format."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        record = Record(_request_id(Headers(scope=scope).get("x-request-id", "")))
        scope["dreamllm.record"] = record

        async def receiving() -> Message:
            message = await receive()
            record.body_read |= not message.get("more_body", False)
            return message

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = record.id
                headers["cache-control"] = "no-store"
            await send(message)

        try:
            await self._app(scope, receiving, sending)
        except ApiError as error:
            response = await refusal(error, scope, receiving, self._service.limits)
            await response(scope, receiving, sending)
        except Exception:
            _log.exception("a request failed", extra={"fields": {"id": record.id}})
        finally:
            self._note(scope, record)

    def _note(self, scope: Scope, record: Record) -> None:
        seconds = time.monotonic() - record.arrived
        route = getattr(scope.get("route"), "path", "other")
        self._service.metrics.answered(route, record.status, seconds)
        fields: dict[str, Any] = {
            "id": record.id,
            "method": scope["method"],
            "route": route,
            "status": record.status,
            "seconds": round(seconds, 4),
        }
        if record.code is not None:
            fields["code"] = record.code
        if record.usage is not None:
            self._service.metrics.used(record.usage)
            fields |= {
                "prompt_tokens": record.usage.prompt_tokens,
                "completion_tokens": record.usage.completion_tokens,
                "pictures": record.usage.pictures,
            }
        if record.prompt is not None:
            fields["prompt"] = record.prompt
        log_event(_log, "request", **fields)


async def refusal(error: ApiError, scope: Scope, receive: Receive, limits: Limits) -> Response:
    """The answer that says an error, once the client has sent what it is sending."""
    record = record_of(scope)
    record.code = error.code
    if not record.body_read and error.status != 408:  # which is sent because nothing comes
        await discard_body(receive, limits)
    return error.response()


class Guarded:
    """Lets requests in that carry a key; those that make work only where there is a place and the server goes on."""

    def __init__(self, app: ASGIApp, service: Service, keys: ApiKeys | None) -> None:
        self._app = app
        self._service = service
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != "/health":
            self._check_key(Headers(scope=scope).get("authorization", ""))
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self._service.draining:
            raise shutting_down()
        self._service.take_place()
        arrived = time.monotonic()
        try:
            await self._app(scope, receive, send)
        finally:
            self._service.give_place(time.monotonic() - arrived)

    def _check_key(self, authorization: str) -> None:
        if self._keys is None or self._keys.accept(authorization):
            return
        message = "no API key was given: send Authorization: Bearer KEY" if not authorization else "wrong API key"
        raise ApiError(401, message, "invalid_api_key", headers={"www-authenticate": "Bearer"})


def _request_id(given: str) -> str:
    """The client's, where it is harmless."""
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
