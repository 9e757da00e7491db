"""The application: routes, and what stands around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from dreamllm.server.chats import answer_chat
from dreamllm.server.completions import answer_completion
from dreamllm.server.errors import ApiError, ClientGoneError, internal, json_response, shutting_down
from dreamllm.server.images import answer_images
from dreamllm.server.keys import ApiKeys
from dreamllm.server.middleware import CLIENT_LEFT, Guarded, Observed, record_of, refusal
from dreamllm.server.options import check_model
from dreamllm.server.service import Service


def create_app(
    service: Service, keys: ApiKeys | None = None, add_routes: Callable[[FastAPI], None] = lambda app: None
) -> ASGIApp:
    """The ASGI application of a service; with `keys`, everything but /health needs one of them.

    `add_routes` adds routes to the application, to which everything applies that applies to its own.
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    add_routes(app)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer_chat(service, request)

    @app.post("/v1/completions")
    async def completion(request: Request) -> Response:
        return await answer_completion(service, request)

    @app.post("/v1/images/generations")
    async def images(request: Request) -> Response:
        return await answer_images(service, request)

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        check_model(name, service.served)
        return json_response(_model(service))

    @app.get("/health")
    async def health() -> Response:
        if service.draining:
            raise shutting_down()
        if not service.backend.alive():
            raise internal()
        return json_response({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    _handle_errors(app, service)
    return Observed(Guarded(app, service, keys), service)


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.served.name, "object": "model", "created": service.started, "owned_by": "dreamllm"}


def _handle_errors(app: FastAPI, service: Service) -> None:
    async def answer(request: Request, error: ApiError) -> Response:
        return await refusal(error, request.scope, request.receive, service.limits)

    async def routing(request: Request, error: HTTPException) -> Response:
        what = f"{request.method} {request.url.path[:100]}"
        message = f"{what} does not exist here" if error.status_code == 404 else f"{what}: {error.detail}"
        refused = ApiError(error.status_code, message, "unknown_url", headers=error.headers)
        return await refusal(refused, request.scope, request.receive, service.limits)

    async def gone(request: Request, error: ClientGoneError) -> Response:
        record_of(request.scope).code = "client_left"
        return Response(status_code=CLIENT_LEFT)

    async def unexpected(request: Request, error: Exception) -> Response:
        return await refusal(internal(), request.scope, request.receive, service.limits)

    app.add_exception_handler(ApiError, answer)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, routing)  # type: ignore[arg-type]
    app.add_exception_handler(ClientGoneError, gone)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, unexpected)
