"""Runs the application with uvicorn until a signal, and ends it without losing an answer."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from functools import partial
from ipaddress import ip_address
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from dreamllm.server.app import create_app
from dreamllm.server.connections import Connection
from dreamllm.server.keys import ApiKeys
from dreamllm.server.logs import log_as_json, log_event
from dreamllm.server.service import Service

_log = logging.getLogger(__name__)
_CLOSING_SECONDS = 5


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one. Raises `OSError` that names the address."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error}") from None


class Server(uvicorn.Server):
    """Serves on a socket that listens.

    The first SIGTERM or SIGINT, or `stop`, refuses new requests with 503, finishes those that were accepted (at most
    `Limits.drain_seconds` long) and ends; a second signal ends at once.
    """

    def __init__(self, app: ASGIApp, service: Service, on_ready: Callable[[], None] = lambda: None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=partial(Connection, service.limits),  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=service.limits.keep_alive_seconds,
                timeout_graceful_shutdown=_CLOSING_SECONDS,
            )
        )
        self._service = service
        self._on_ready = on_ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining is None:
            self.stop()
        else:
            self.should_exit = self.force_exit = True

    def stop(self) -> None:
        """Begins to end; may be called from any thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._begin_to_drain)

    def _begin_to_drain(self) -> None:
        if self._draining is None:
            log_event(_log, "stopping: no new requests, those that were accepted are finished")
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        await self._service.drain()
        self.should_exit = True


def run(
    service: Service,
    keys: ApiKeys | None,
    listening: socket.socket,
    add_routes: Callable[[FastAPI], None] = lambda app: None,
) -> None:
    """Serves, with logs as JSON, until told to stop; then closes the service. `add_routes` as in `create_app`."""
    log_as_json()
    host, port = listening.getsockname()[:2]
    if keys is None and not ip_address(host).is_loopback:
        _log.warning("anyone who reaches this address may use the server: there are no API keys")
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    ready = partial(log_event, _log, "ready", url=url, model=service.served.name)
    try:
        Server(create_app(service, keys, add_routes), service, ready).run(sockets=[listening])
    finally:
        service.close()
        log_event(_log, "stopped")
