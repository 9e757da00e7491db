"""What the page needs beside the server's interface: its files, what it should know of the model, and attention."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import Field

from dreamllm.demo.attention import AttentionTask, look
from dreamllm.demo.examples import Examples
from dreamllm.server import EngineBackend
from dreamllm.server.bodies import parse_json, read_body
from dreamllm.server.errors import bad_request, json_response, shutting_down, too_late
from dreamllm.server.limits import Limits
from dreamllm.server.options import any_seed, drawing_options
from dreamllm.server.prompts import PictureUrl, check_pieces, load_pictures, raw_document, split_pictures
from dreamllm.server.schemas import Drawing, Seed, parse
from dreamllm.server.service import Served, Service
from dreamllm.server.watching import while_connected

FOLDER = Path(__file__).parent / "page"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data: blob:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
"""Nothing is run or loaded but the page's own files, whatever a model writes."""
HEADERS = {"content-security-policy": POLICY, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}


class AttentionRequest(Drawing):
    """A document whose next picture is drawn, while it is recorded where the dream queries look."""

    prompt: str
    seed: Seed | None = None
    size: Annotated[int, Field(ge=1)] | None = None


def add_routes(app: FastAPI, service: Service, backend: EngineBackend, examples: Examples) -> None:
    """Adds the page to a server's application."""
    files = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.suffix in KINDS}

    def file(name: str) -> Response:
        return Response(files[name], 200, HEADERS, KINDS[Path(name).suffix])

    @app.get("/")
    async def page() -> Response:
        return file("page.html")

    for name in files:  # a route for each, so that no path is ever made of a request
        app.add_api_route(f"/page/{name}", partial(_async, partial(file, name)), methods=["GET"])

    @app.get("/page/about")
    async def about() -> Response:
        return json_response(_about(service, examples))

    @app.get("/page/load")
    async def load() -> Response:
        load = backend.load()
        return json_response({"waiting": load.waiting, "running": load.running, "capacity": backend.capacity()})

    @app.post("/page/attention")
    async def attention(request: Request) -> Response:
        body = await read_body(request, service.limits)
        return await while_connected(request.receive, _attention(service, backend, body))


async def _async(function: partial[Response]) -> Response:
    return function()


def _about(service: Service, examples: Examples) -> dict[str, object]:
    drawing, limits = service.served.drawing, service.limits
    return {
        "model": service.served.name,
        "size": service.served.size,
        "drawing": {
            "steps": drawing.steps,
            "guidance_scale": drawing.guidance_scale,
            "scheduler": drawing.scheduler,
            "negative_prompt": drawing.negative_prompt,
        },
        "limits": {
            "steps": limits.max_steps,
            "pictures": limits.max_pictures_out,
            "pictures_in": limits.max_pictures_in,
            "picture_bytes": limits.max_picture_bytes,
            "tokens": limits.max_new_tokens,
        },
        "examples": examples,
    }


async def _attention(service: Service, backend: EngineBackend, body: bytes) -> Response:
    task = await service.parsed(partial(_understand, body, service.served, service.limits))
    future = backend.call(partial(look, task=task))
    try:
        return json_response(await asyncio.wait_for(asyncio.wrap_future(future), service.limits.request_seconds))
    except asyncio.TimeoutError:
        raise too_late(service.limits.request_seconds) from None
    except asyncio.CancelledError:
        if future.cancelled() and not backend.alive():
            raise shutting_down() from None
        raise
    except ValueError as error:
        raise bad_request(str(error), code="invalid_request") from None
    finally:
        future.cancel()


def _understand(body: bytes, served: Served, limits: Limits) -> AttentionTask:
    request = parse(AttentionRequest, parse_json(body))
    if not request.prompt.strip():
        raise bad_request("the prompt is empty; describe the picture", "prompt", "invalid_value")
    pieces = split_pictures(request.prompt, "prompt")
    check_pieces(pieces, "prompt", limits)
    pictures = load_pictures([piece for piece in pieces if isinstance(piece, PictureUrl)], {}, limits)
    drawing = drawing_options(request, request.size, served, limits)
    return AttentionTask(raw_document(pieces, pictures), drawing, any_seed(request.seed))
