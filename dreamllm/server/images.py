"""`POST /v1/images/generations`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from math import ceil
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from PIL import Image

from dreamllm.documents import Document, Text
from dreamllm.inference import GenerationOptions
from dreamllm.server.backend import Event, Finished, PictureDrawn, PictureStep, Work
from dreamllm.server.bodies import parse_json, read_body
from dreamllm.server.errors import bad_request
from dreamllm.server.limits import Limits
from dreamllm.server.middleware import Record, record_of
from dreamllm.server.options import any_seed, beyond, check_model, drawing_options
from dreamllm.server.pictures import png_base64
from dreamllm.server.prompts import check_text
from dreamllm.server.replies import completed_image, images_reply, partial_image
from dreamllm.server.schemas import ImagesRequest, parse
from dreamllm.server.service import Running, Served, Service
from dreamllm.server.streams import answer_whole, answer_with_events
from dreamllm.server.watching import while_connected

_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")


async def answer_images(service: Service, request: Request) -> Response:
    """Draws pictures for a caption. Raises `ApiError` or `ClientGoneError`."""
    record = record_of(request.scope)
    body = await read_body(request, service.limits)
    return await while_connected(request.receive, _answer(service, record, body))


async def _answer(service: Service, record: Record, body: bytes) -> Response:
    work, stream = await service.parsed(partial(_understand, body, service.served, service.limits))
    if service.log_prompts:
        record.prompt = [work.prompt.text()]
    running = service.submit(work, record.arrived)
    if stream:
        return await answer_with_events(running, partial(_events, service, running, work, record), record)
    return await answer_whole(running, _collect(service, running, work, record))


async def _collect(service: Service, running: Running, work: Work, record: Record) -> dict[str, Any]:
    pictures: list[str] = []
    while True:
        event = await running.next()
        if isinstance(event, PictureDrawn):
            pictures.append(await service.parsed(partial(png_base64, event.image)))
        if isinstance(event, Finished):
            record.usage = event.usage
            return images_reply(pictures, _size_of(work, service.served), work.options.seed, event.usage)


async def _events(
    service: Service, running: Running, work: Work, record: Record, event: Event
) -> AsyncIterator[dict[str, Any]]:
    """Previews as they come, then every picture."""
    size, seed = _size_of(work, service.served), work.options.seed
    previews: Counter[int] = Counter()
    pictures: list[Image.Image] = []
    while not isinstance(event, Finished):
        if isinstance(event, PictureStep):
            number = previews[event.candidate]
            previews[event.candidate] += 1
            yield await service.parsed(partial(partial_image, event, number, size, seed))
        if isinstance(event, PictureDrawn):
            pictures.append(event.image)
        event = await running.next()
    record.usage = event.usage
    for index, picture in enumerate(pictures):
        yield await service.parsed(partial(completed_image, picture, index, size, seed, event.usage))


def _size_of(work: Work, served: Served) -> str:
    drawing = work.options.drawing
    side = drawing.size if drawing is not None and drawing.size is not None else served.size
    return f"{side}x{side}"


def _understand(body: bytes, served: Served, limits: Limits) -> tuple[Work, bool]:
    """The work, and whether its answer is a stream."""
    request = parse(ImagesRequest, parse_json(body))
    if request.model is not None:
        check_model(request.model, served)
    if not request.prompt.strip():
        raise bad_request("the prompt is empty; describe the picture", "prompt", "invalid_value")
    check_text([request.prompt], "prompt", limits)
    count = 1 if request.n is None else request.n
    if count > limits.max_pictures_out:
        raise beyond("n", count, limits.max_pictures_out)
    drawing = replace(drawing_options(request, _side(request.size), served, limits), candidates=count)
    options = GenerationOptions(max_new_tokens=0, pictures="force", seed=any_seed(request.seed), drawing=drawing)
    if request.partial_images and not request.stream:
        raise bad_request("partial_images has a meaning with stream only", "partial_images", "invalid_value")
    every = ceil(drawing.steps / (request.partial_images + 1)) if request.partial_images else 0
    return Work(Document((Text(request.prompt),), "error", "the prompt"), options, every), bool(request.stream)


def _side(size: str | None) -> int | None:
    if size is None or size == "auto":
        return None
    match = _SIZE.fullmatch(size)
    if match is None or match[1] != match[2]:
        raise bad_request("size must be 'auto' or a square such as '512x512'", "size", "invalid_value")
    return int(match[1])
