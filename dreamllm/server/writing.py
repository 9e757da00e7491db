"""What chats and completions have in common: an answer of text and pictures, whole or as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from PIL import Image

from dreamllm.documents import Document, Text
from dreamllm.inference import GenerationOptions
from dreamllm.server.backend import Event, Finished, PictureDrawn, PictureStep, TextPiece, Work
from dreamllm.server.bodies import read_body
from dreamllm.server.errors import bad_request
from dreamllm.server.limits import Limits
from dreamllm.server.middleware import Record, record_of
from dreamllm.server.options import check_model, writing_options
from dreamllm.server.pictures import is_address
from dreamllm.server.prompts import PictureUrl, load_pictures
from dreamllm.server.replies import FINISH_REASONS, Composer, Reply, content_of
from dreamllm.server.schemas import Writing
from dreamllm.server.service import Running, Served, Service
from dreamllm.server.streams import answer_whole, answer_with_events
from dreamllm.server.watching import while_connected


@dataclass(frozen=True)
class Asked:
    """A request that was understood; its pictures are still to be had. `document` makes the prompt of them."""

    request: Writing
    options: GenerationOptions
    pictures: Sequence[PictureUrl]
    document: Callable[[Mapping[PictureUrl, Image.Image]], Document]


Understand = Callable[[bytes, Served, Limits], Asked]


async def answer_writing(service: Service, request: Request, understand: Understand, reply: type[Reply]) -> Response:
    """Answers a request for text and pictures. Raises `ApiError` or `ClientGoneError`."""
    record = record_of(request.scope)
    body = await read_body(request, service.limits)
    return await while_connected(request.receive, _answer(service, record, body, understand, reply))


def check_writing(request: Writing, served: Served, limits: Limits) -> GenerationOptions:
    """The options of a request. Raises `ApiError` for another model's name and fields that exclude each other."""
    check_model(request.model, served)
    for name in ("stream_options", "preview_every"):
        if getattr(request, name) is not None and not request.stream:
            raise bad_request(f"{name} has a meaning with stream only", name, "invalid_value")
    return writing_options(request, served, limits)


async def _answer(service: Service, record: Record, body: bytes, understand: Understand, kind: type[Reply]) -> Response:
    asked = await service.parsed(partial(understand, body, service.served, service.limits))
    addresses = [picture for picture in asked.pictures if is_address(picture.url)]
    fetched = await _fetch(service, {picture.url: picture.param for picture in addresses})
    work = await service.parsed(partial(_work, asked, fetched, service.limits))
    if service.log_prompts:
        record.prompt = [part.text for part in work.prompt.parts if isinstance(part, Text)]
    service.metrics.read_pictures(len(work.prompt.pictures()))
    running = service.submit(work, record.arrived)
    reply = kind(record.id, service.served.name, work.options.seed)
    if asked.request.stream:
        options = asked.request.stream_options
        with_usage = options is not None and bool(options.include_usage)
        return await answer_with_events(running, partial(_chunks, running, reply, record, with_usage), record)
    return await answer_whole(running, _whole(service, running, reply, record))


async def _whole(service: Service, running: Running, reply: Reply, record: Record) -> dict[str, Any]:
    while True:
        event = await running.next()
        if isinstance(event, Finished):
            record.usage = event.usage
            content = await service.parsed(partial(content_of, event.document)) if event.document else ""
            return reply.whole(content, FINISH_REASONS[event.reason], event.usage)


async def _chunks(
    running: Running, reply: Reply, record: Record, with_usage: bool, event: Event
) -> AsyncIterator[dict[str, Any]]:
    if reply.opening is not None:
        yield reply.opening
    composer = Composer()
    while not isinstance(event, Finished):
        if isinstance(event, TextPiece) and (content := composer.text(event.text)):
            yield reply.chunk(content)
        if isinstance(event, PictureDrawn):
            yield reply.chunk(composer.picture(event.image))
        if isinstance(event, PictureStep):
            yield reply.preview(event)
        event = await running.next()
    record.usage = event.usage
    yield reply.last(FINISH_REASONS[event.reason])
    if with_usage:
        yield reply.usage_chunk(event.usage)


async def _fetch(service: Service, wanted: dict[str, str]) -> dict[str, bytes]:
    """Pictures by address; `wanted`: the parameter that names each."""
    fetcher = service.fetcher
    if not wanted:
        return {}
    if fetcher is None:
        param = next(iter(wanted.values()))
        message = "this server fetches no pictures; send them as data:image/png;base64,..."
        raise bad_request(message, param, "image_address_refused")
    bodies = await asyncio.gather(
        *(service.fetched(partial(fetcher.fetch, url, param)) for url, param in wanted.items())
    )
    return dict(zip(wanted, bodies, strict=True))


def _work(asked: Asked, fetched: dict[str, bytes], limits: Limits) -> Work:
    pictures = load_pictures(asked.pictures, fetched, limits)
    return Work(asked.document(pictures), asked.options, asked.request.preview_every or 0)
