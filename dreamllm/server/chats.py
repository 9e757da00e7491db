"""`POST /v1/chat/completions`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from dreamllm.documents import Text
from dreamllm.inference import GenerationOptions
from dreamllm.server.backend import Event, Failed, Finished, PictureDrawn, TextPiece, Work
from dreamllm.server.bodies import parse_json, read_body
from dreamllm.server.errors import ApiError, ClientGoneError, bad_request, json_response, of_failure
from dreamllm.server.limits import Limits
from dreamllm.server.middleware import CLIENT_LEFT, Record, record_of
from dreamllm.server.options import chat_options, check_model
from dreamllm.server.pictures import is_address
from dreamllm.server.prompts import Turn, chat_document, load_pictures, pictures_of, read_turns
from dreamllm.server.replies import FINISH_REASONS, ChatReply, Composer, content_of
from dreamllm.server.schemas import ChatRequest, parse
from dreamllm.server.service import Running, Served, Service
from dreamllm.server.watching import while_connected


@dataclass(frozen=True)
class Chat:
    """A request that was understood; its pictures are still to be had."""

    request: ChatRequest
    options: GenerationOptions
    system: str | None
    turns: Sequence[Turn]


async def answer_chat(service: Service, request: Request) -> Response:
    """Answers a chat whole or as server-sent events. Raises `ApiError` or `ClientGoneError`."""
    record = record_of(request.scope)
    body = await read_body(request, service.limits)
    return await while_connected(request.receive, _answer(service, record, body))


async def _answer(service: Service, record: Record, body: bytes) -> Response:
    chat = await service.parsed(partial(_understand, body, service.served, service.limits))
    addresses = [picture for picture in pictures_of(chat.turns) if is_address(picture.url)]
    fetched = await _fetch(service, {picture.url: picture.param for picture in addresses})
    work = await service.parsed(partial(_work, chat, fetched, service.served, service.limits))
    if service.log_prompts:
        record.prompt = [part.text for part in work.prompt.parts if isinstance(part, Text)]
    service.metrics.read_pictures(len(work.prompt.pictures()))
    running = service.submit(work, record.arrived)
    reply = ChatReply(record.id, service.served.name, work.options.seed)
    handed_over = False
    try:
        if chat.request.stream:
            first = await running.next()
            if isinstance(first, Failed):
                raise of_failure(first)
            options = chat.request.stream_options
            with_usage = options is not None and bool(options.include_usage)
            stream = ChatStream(running, first, reply, record, with_usage)
            handed_over = True
            return stream
        return json_response(await _whole(service, running, reply, record))
    finally:
        if not handed_over:
            running.close()


async def _whole(service: Service, running: Running, reply: ChatReply, record: Record) -> dict[str, Any]:
    while True:
        event = await running.next()
        if isinstance(event, Failed):
            raise of_failure(event)
        if isinstance(event, Finished):
            record.usage = event.usage
            content = await service.parsed(partial(content_of, event.document)) if event.document else ""
            return reply.whole(content, FINISH_REASONS[event.reason], event.usage)


class ChatStream(Response):
    """An answer as server-sent events. Ends its work when the client leaves or takes too long to read."""

    media_type = "text/event-stream"

    def __init__(self, running: Running, first: Event, reply: ChatReply, record: Record, with_usage: bool) -> None:
        super().__init__(None, 200, {"x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._running = running
        self._first = first
        self._reply = reply
        self._record = record
        self._with_usage = with_usage

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
            async for value in self._values():
                await send(_message(json.dumps(value)))
            await send(_message("[DONE]"))
        except ApiError as error:
            self._record.code = error.code
            await send(_message(json.dumps(error.body())))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _values(self) -> AsyncIterator[dict[str, Any]]:
        yield self._reply.chunk({"role": "assistant", "content": ""})
        composer = Composer()
        event = self._first
        while not isinstance(event, Finished):
            if isinstance(event, Failed):
                raise of_failure(event)
            if isinstance(event, TextPiece) and (content := composer.text(event.text)):
                yield self._reply.chunk({"content": content})
            if isinstance(event, PictureDrawn):
                yield self._reply.chunk({"content": composer.picture(event.image)})
            event = await self._running.next()
        self._record.usage = event.usage
        yield self._reply.chunk({}, FINISH_REASONS[event.reason])
        if self._with_usage:
            yield self._reply.usage_chunk(event.usage)


def _message(data: str) -> dict[str, Any]:
    return {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True}


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


def _understand(body: bytes, served: Served, limits: Limits) -> Chat:
    request = parse(ChatRequest, parse_json(body))
    check_model(request.model, served)
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options has a meaning with stream only", "stream_options", "invalid_value")
    options = chat_options(request, served, limits)
    system, turns = read_turns(request.messages, limits)
    return Chat(request, options, system, turns)


def _work(chat: Chat, fetched: dict[str, bytes], served: Served, limits: Limits) -> Work:
    pictures = load_pictures(chat.turns, fetched, limits)
    return Work(chat_document(chat.system, chat.turns, pictures, served.template), chat.options)
