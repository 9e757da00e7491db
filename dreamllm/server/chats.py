"""`POST /v1/chat/completions`."""

from __future__ import annotations

from functools import partial

from fastapi import Request
from fastapi.responses import Response

from dreamllm.server.bodies import parse_json
from dreamllm.server.limits import Limits
from dreamllm.server.prompts import chat_document, pictures_of, read_turns
from dreamllm.server.replies import ChatReply
from dreamllm.server.schemas import ChatRequest, parse
from dreamllm.server.service import Served, Service
from dreamllm.server.writing import Asked, answer_writing, check_writing


async def answer_chat(service: Service, request: Request) -> Response:
    """Answers a chat whole or as server-sent events. Raises `ApiError` or `ClientGoneError`."""
    return await answer_writing(service, request, _understand, ChatReply)


def _understand(body: bytes, served: Served, limits: Limits) -> Asked:
    request = parse(ChatRequest, parse_json(body))
    options = check_writing(request, served, limits)
    system, turns = read_turns(request.messages, limits)
    document = partial(chat_document, system, turns, template=served.template)
    return Asked(request, options, pictures_of(turns), document)
