"""Refusals and failures in OpenAI's error format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi.responses import Response

from dreamllm.server.backend import Failed

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is an error. `code` names the kind for programs, `param` the field of the request at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return json_response(self.body(), self.status, self.headers)


class ClientGoneError(Exception):
    """The client has closed the connection; nobody reads an answer."""


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII: messages may repeat what a client sent, lone surrogates included."""
    return Response(json.dumps(value).encode(), status, dict(headers or {}), "application/json")


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, code, param)


def too_late(seconds: int) -> ApiError:
    message = f"the answer was not ready within {seconds} seconds, the limit of this server; ask for less"
    # The clients repeat requests that failed with 5xx, but this one would take as long again.
    return ApiError(504, message, "timeout", headers={"x-should-retry": "false"})


def shutting_down() -> ApiError:
    headers = {"retry-after": "5", "connection": "close"}
    return ApiError(503, "the server is shutting down", "shutting_down", headers=headers)


def internal() -> ApiError:
    return ApiError(500, "the server failed; the log has the details under this request's id", "internal_error")


def of_failure(failed: Failed) -> ApiError:
    if failed.fault == "request":
        return bad_request(failed.message, code="invalid_request")
    return shutting_down() if failed.fault == "closed" else internal()
