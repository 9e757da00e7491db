"""A request's fields -> the options of its answer, within the limits."""

from __future__ import annotations

import secrets

from dreamllm.inference import DrawingOptions, GenerationOptions
from dreamllm.server.errors import ApiError, bad_request
from dreamllm.server.limits import Limits
from dreamllm.server.schemas import ChatDrawing, Drawing, Writing
from dreamllm.server.service import Served

DEFAULT_NEW_TOKENS = 512


def writing_options(request: Writing, served: Served, limits: Limits) -> GenerationOptions:
    """Raises `ApiError` for values that exclude each other and those beyond the limits."""
    drawing = request.drawing or ChatDrawing()
    temperature = request.temperature or 0.0
    pictures = request.pictures or "allow"
    most_pictures = limits.max_pictures_out if request.max_pictures is None else request.max_pictures
    if most_pictures > limits.max_pictures_out:
        raise beyond("max_pictures", most_pictures, limits.max_pictures_out)
    if pictures == "force" and most_pictures < 1:
        raise bad_request("pictures 'force' needs max_pictures of at least 1", "max_pictures", "invalid_value")
    return GenerationOptions(
        max_new_tokens=_new_tokens(request, limits),
        max_pictures=most_pictures,
        pictures=pictures,
        temperature=temperature,
        # The most likely token is the same among fewer, so that clients may send these with temperature 0.
        top_p=(request.top_p or 1.0) if temperature else 1.0,
        top_k=(request.top_k or 0) if temperature else 0,
        stop=_stops(request.stop),
        seed=any_seed(request.seed),
        drawing=drawing_options(drawing, drawing.size, served, limits),
    )


def _stops(given: str | list[str] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())


def _new_tokens(request: Writing, limits: Limits) -> int:
    given = {request.max_tokens, getattr(request, "max_completion_tokens", None)} - {None}
    if len(given) > 1:
        raise bad_request("max_tokens and max_completion_tokens differ; give one", "max_tokens", "invalid_value")
    tokens = given.pop() if given else None
    if tokens is None:
        return min(DEFAULT_NEW_TOKENS, limits.max_new_tokens)
    if tokens > limits.max_new_tokens:
        raise beyond("max_tokens", tokens, limits.max_new_tokens)
    return tokens


def drawing_options(given: Drawing, size: int | None, served: Served, limits: Limits) -> DrawingOptions:
    """The model's own options with what a request gives. Raises `ApiError` beyond the limits."""
    if given.steps is not None and given.steps > limits.max_steps:
        raise beyond("steps", given.steps, limits.max_steps)
    if size is not None and size > limits.max_size:
        raise beyond("size", size, limits.max_size)
    return served.drawing.changed(**{name: getattr(given, name) for name in Drawing.model_fields}, size=size)


def any_seed(given: int | None) -> int:
    """The request's seed, or a random one that the reply names."""
    return secrets.randbits(31) if given is None else given


def check_model(name: str, served: Served) -> None:
    """Raises `ApiError` 404 for the name of another model."""
    if name != served.name:
        message = f"the model {name[:100]!r} does not exist; this server has {served.name!r}"
        raise ApiError(404, message, "model_not_found", "model")


def beyond(param: str, value: int, limit: int) -> ApiError:
    """The refusal of a value that the server's limits exclude."""
    return bad_request(f"{param} {value} is beyond the limit of this server, {limit}", param, "limit_exceeded")
