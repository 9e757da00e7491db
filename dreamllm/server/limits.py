"""What one request and all requests together may cost the server."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """Bounds that the server keeps. What exceeds one is refused with its name and value.

    Attributes:
        max_body_bytes: of a request.
        max_text_characters: of all messages of a request together.
        max_pictures_in: pictures that a request shows to the model.
        max_picture_bytes: of one picture, as its file has them.
        max_picture_pixels: of all pictures of a request together, as their headers declare them.
        max_picture_ratio: of the longer side of a picture to the shorter; vision encoders scale the shorter one up.
        max_new_tokens: of an answer; 512 or this, whichever is less, where a request does not say.
        max_pictures_out: pictures in an answer, and pictures of one call for pictures.
        max_steps: denoising steps of a picture.
        max_size: side in pixels of a picture to draw.
        max_connections: open at once; further ones are closed.
        request_seconds: from the arrival of a request to the end of its answer.
        head_seconds: for the arrival of a request's head, from the connection or from the head's first byte.
        body_seconds: for the arrival of a request's body.
        send_seconds: for a client to read what an answer has ready, when it has stopped reading.
        keep_alive_seconds: that a connection stays open between requests.
        fetch_seconds: for fetching a picture, redirects included, where addresses are allowed.
        drain_seconds: for answers in the making when the server is told to stop.

    Raises `ValueError` when made with a value below 1.
    """

    max_body_bytes: int = 32 * 2**20
    max_text_characters: int = 200_000
    max_pictures_in: int = 8
    max_picture_bytes: int = 10 * 2**20
    max_picture_pixels: int = 12_000_000
    max_picture_ratio: int = 20
    max_new_tokens: int = 2048
    max_pictures_out: int = 10
    max_steps: int = 250
    max_size: int = 1024
    max_connections: int = 512
    request_seconds: int = 600
    head_seconds: int = 10
    body_seconds: int = 60
    send_seconds: int = 120
    keep_alive_seconds: int = 15
    fetch_seconds: int = 10
    drain_seconds: int = 60

    def __post_init__(self) -> None:
        for entry in fields(self):
            if getattr(self, entry.name) < 1:
                raise ValueError(f"{entry.name} must be at least 1, not {getattr(self, entry.name)}")
