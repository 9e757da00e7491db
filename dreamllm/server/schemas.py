"""What clients may send: OpenAI's fields that have a meaning here, and DreamLLM's own.

Fields of OpenAI's that change nothing are accepted; those that would have to be ignored are not.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dreamllm.inference.drawing import MAX_SEED, Scheduler
from dreamllm.server.errors import ApiError, bad_request

MAX_STOPS = 4
MAX_PARTIAL_IMAGES = 20
_SHOWN = 64
Empty = Field(max_length=0)
Nothing = None | Literal[False] | Annotated[list[Any], Empty] | Annotated[dict[str, Any], Empty]
"""The value of a field that would ask for something that does not exist here."""

Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Zero = Annotated[float, Field(ge=0.0, le=0.0)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class ImageUrl(Strict):
    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class Message(Strict):
    """A turn. Fields that answers carry are accepted where they are empty, so that answers can be sent back."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], Field(max_length=4096)]
    name: str | None = None
    refusal: Nothing = None
    annotations: Nothing = None
    audio: Nothing = None
    function_call: Nothing = None
    tool_calls: Nothing = None


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ResponseFormat(Strict):
    type: Literal["text"]


class Drawing(Strict):
    """How pictures are drawn, as `DrawingOptions`; what is left out is what the model recommends."""

    steps: Annotated[int, Field(ge=1)] | None = None
    guidance_scale: Annotated[float, Field(ge=0.0, le=100.0)] | None = None
    scheduler: Scheduler | None = None
    negative_prompt: str | None = None


class ChatDrawing(Drawing):
    size: Annotated[int, Field(ge=1)] | None = None


class Writing(Strict):
    """What asks for text and pictures. DreamLLM's own: `pictures`, `max_pictures`, `top_k`, `drawing` and, for streams,
    `preview_every`, after so many denoising steps."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    seed: Seed | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    pictures: Literal["allow", "forbid", "force"] | None = None
    max_pictures: Annotated[int, Field(ge=0)] | None = None
    drawing: ChatDrawing | None = None
    preview_every: Annotated[int, Field(ge=0)] | None = None
    # what changes nothing
    n: Literal[1] | None = None
    user: str | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logprobs: Nothing = None
    logit_bias: Nothing = None


class ChatRequest(Writing):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    # what changes nothing
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    response_format: ResponseFormat | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    tools: Nothing = None
    functions: Nothing = None
    store: Nothing = None


class CompletionRequest(Writing):
    """`POST /v1/completions`: a text, which may hold pictures as answers do, is continued as a document."""

    prompt: str
    # what changes nothing
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: Nothing = None


class ImagesRequest(Drawing):
    """`POST /v1/images/generations`. DreamLLM's own: `seed` and the fields of `Drawing`.

    `partial_images`: what there is of each picture so many times on the way, with `stream`.
    """

    prompt: str
    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    size: str | None = None
    response_format: Literal["b64_json"] | None = None
    seed: Seed | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=MAX_PARTIAL_IMAGES)] | None = None
    # what changes nothing
    user: str | None = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto"] | None = None
    output_format: Literal["png"] | None = None


Parsed = TypeVar("Parsed", bound=Strict)


def parse(kind: type[Parsed], value: Any) -> Parsed:
    """Checks a request's JSON. Raises `ApiError` that names the field at fault and what it may hold."""
    if not isinstance(value, dict):
        raise bad_request("the request must be a JSON object", code="invalid_request")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _explained(error, value) from None


def _explained(error: ValidationError, value: Any) -> ApiError:
    # Of a field with several forms, the error of the form that got furthest, rather than that of another type.
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    problem = max(problems, key=lambda problem: (len(problem["loc"]), not problem["type"].endswith("_type")))
    param = _path(problem["loc"], value)
    if problem["type"] == "extra_forbidden":
        return bad_request(f"unknown or unsupported parameter {param!r}", param, "unknown_parameter")
    if problem["type"] == "missing":
        return bad_request(f"missing parameter {param!r}", param, "missing_parameter")
    return bad_request(f"{param}: {problem['msg']}", param, "invalid_value")


def _path(loc: tuple[int | str, ...], value: Any) -> str:
    """Where in the request: the steps of `loc` without the names of the forms that were tried."""
    path = ""
    for i, step in enumerate(loc):
        if isinstance(value, dict) and (step in value or i == len(loc) - 1):
            path += f".{str(step)[:_SHOWN]}"
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int):
            path += f"[{step}]"
            value = value[step]
    return path.removeprefix(".")
