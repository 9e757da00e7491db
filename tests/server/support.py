"""Servers in this process for tests, and clients without a library between them and the wire."""

from __future__ import annotations

import base64
import http.client
import io
import json
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from dreamllm.documents import Document, Picture, Text, chat_template
from dreamllm.inference import DrawingOptions
from dreamllm.server import Finished, Limits, Load, PictureDrawn, Started, TextPiece, Usage, Work
from dreamllm.server.app import create_app
from dreamllm.server.fetching import Fetcher
from dreamllm.server.keys import ApiKeys
from dreamllm.server.running import Server, listen
from dreamllm.server.service import Served, Service

MODEL = "scripted"
PATIENCE = 30.0
"""Seconds after which a test that awaits something fails."""
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
IMAGES = "/v1/images/generations"


@dataclass
class Job:
    """Work that a scripted backend was given."""

    work: Work
    emit: Callable
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self.cancelled.set()

    def answer(self, *pieces: str | Image.Image, reason: str = "end", usage: Usage | None = None) -> None:
        self.emit(Started())
        for piece in pieces:
            self.emit(TextPiece(piece) if isinstance(piece, str) else PictureDrawn(piece))
        parts = [Text(p) if isinstance(p, str) else Picture(p, comprehension=True, creation=True) for p in pieces]
        usage = usage or Usage(3, 2, sum(not isinstance(p, str) for p in pieces))
        self.emit(Finished(reason, usage, Document(tuple(parts))))


class Scripted:
    """A backend whose answers the test decides: those of `script`, else whatever is done with `jobs.get()`."""

    def __init__(self, script: Callable[[Job], None] | None = None, capacity: int = 2) -> None:
        self.jobs: queue.Queue[Job] = queue.Queue()
        self.closed = False
        self._script = script
        self._capacity = capacity

    def next_job(self) -> Job:
        return self.jobs.get(timeout=PATIENCE)

    def submit(self, work: Work, emit: Callable) -> Job:
        job = Job(work, emit)
        if self._script is None:
            self.jobs.put(job)
        else:
            self._script(job)
        return job

    def load(self) -> Load:
        return Load(self.jobs.qsize(), 0)

    def capacity(self) -> int:
        return self._capacity

    def alive(self) -> bool:
        return not self.closed

    def close(self) -> None:
        self.closed = True


def hello(job: Job) -> None:
    job.answer("Hello.")


@dataclass
class Reply:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]


@dataclass
class Address:
    """A server that listens."""

    port: int
    service: Service | None = None
    server: Server | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)

    def request(self, method: str, path: str, body: bytes | None = None, headers: dict | None = None) -> Reply:
        connection = self.connect()
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return Reply(response.status, response.headers, response.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        return self.request("GET", path, headers=headers)

    def post(self, path: str, value: Any, **headers: str) -> Reply:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        return self.request("POST", path, body, {"content-type": "application/json", **headers})

    def send(self, path: str, value: Any) -> socket.socket:
        """Sends a request and hands over the connection, on which the answer will come."""
        body = json.dumps(value).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        connection.sendall(head.encode() + body)
        return connection


@contextmanager
def serving(
    backend: Any,
    limits: Limits | None = None,
    served: Served | None = None,
    keys: ApiKeys | None = None,
    fetcher: Fetcher | None = None,
    max_queue: int = 8,
    log_prompts: bool = False,
    add_routes: Callable = lambda app, service: None,
) -> Iterator[Address]:
    """A server on a thread of this process, which ends when the block does."""
    served = served or Served(MODEL, chat_template("plain"), DrawingOptions(), 8)
    service = Service(backend, served, limits or Limits(), max_queue, fetcher, log_prompts)
    listening = listen("127.0.0.1", 0)
    ready = threading.Event()
    app = create_app(service, keys, lambda app: add_routes(app, service=service))
    server = Server(app, service, ready.set)
    address = Address(listening.getsockname()[1], service, server)

    def run() -> None:
        server.run(sockets=[listening])
        service.close()
        address.ended.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(PATIENCE)
    try:
        yield address
    finally:
        if not address.ended.is_set():
            server.stop()
        thread.join(PATIENCE)
        listening.close()
        assert not thread.is_alive(), "the server did not stop"


def chat(*messages: Any, **fields: Any) -> dict[str, Any]:
    """A chat of user and assistant in turns."""
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": content} for i, content in enumerate(messages or ("Hello",))]
    return {"model": MODEL, "messages": turns, **fields}


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def image_part(data: bytes | Image.Image, kind: str = "png") -> dict[str, Any]:
    data = encoded(data) if isinstance(data, Image.Image) else data
    return {"type": "image_url", "image_url": {"url": data_url(data, kind)}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
