"""`POST /v1/completions`: a document, of text with pictures in it, is continued as it stands, without a template."""

from __future__ import annotations

from functools import partial

from fastapi import Request
from fastapi.responses import Response

from dreamllm.server.bodies import parse_json
from dreamllm.server.errors import bad_request
from dreamllm.server.limits import Limits
from dreamllm.server.prompts import PictureUrl, check_pieces, raw_document, split_pictures
from dreamllm.server.replies import CompletionReply
from dreamllm.server.schemas import CompletionRequest, parse
from dreamllm.server.service import Served, Service
from dreamllm.server.writing import Asked, answer_writing, check_writing


async def answer_completion(service: Service, request: Request) -> Response:
    """Continues a document whole or as server-sent events. Raises `ApiError` or `ClientGoneError`."""
    return await answer_writing(service, request, _understand, CompletionReply)


def _understand(body: bytes, served: Served, limits: Limits) -> Asked:
    request = parse(CompletionRequest, parse_json(body))
    options = check_writing(request, served, limits)
    pieces = split_pictures(request.prompt, "prompt")
    pictures = [piece for piece in pieces if isinstance(piece, PictureUrl)]
    if not request.prompt.strip():
        raise bad_request("the prompt is empty; give it text or a picture", "prompt", "invalid_value")
    check_pieces(pieces, "prompt", limits)
    return Asked(request, options, pictures, partial(raw_document, pieces))
