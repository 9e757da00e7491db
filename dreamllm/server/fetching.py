"""Pictures by address, where the server is told to fetch them: from public hosts only.

A host name is resolved once, every address that it has must be public, and the connection goes to an address that was
checked, so that a name cannot mean something else a moment later. The same holds for every redirect.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import SplitResult, urljoin, urlsplit

from dreamllm.server.errors import bad_request
from dreamllm.server.limits import Limits

MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK = 64 * 1024
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, also one that is wrapped in an IPv6 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host. Raises `OSError` where it has none."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


class Fetcher:
    """Fetches pictures. `resolve` and `allowed` decide where a connection goes."""

    def __init__(
        self,
        limits: Limits,
        resolve: Callable[[str, int], list[str]] = resolve,
        allowed: Callable[[str], bool] = is_public,
    ) -> None:
        self._limits = limits
        self._resolve = resolve
        self._allowed = allowed

    def fetch(self, url: str, param: str) -> bytes:
        """The body at an address. Raises `ApiError` naming `param` for whatever else comes of it."""
        deadline = time.monotonic() + self._limits.fetch_seconds
        try:
            for _ in range(MAX_REDIRECTS + 1):
                target = self._get(url, param, deadline)
                if isinstance(target, bytes):
                    return target
                url = target
        except (OSError, http.client.HTTPException, ValueError) as error:
            if time.monotonic() >= deadline:
                late = f"a picture could not be fetched within {self._limits.fetch_seconds} seconds"
                raise bad_request(late, param, "image_fetch_failed") from None
            reason = type(error).__name__
            raise bad_request(f"a picture could not be fetched: {reason}", param, "image_fetch_failed") from None
        raise bad_request(f"a picture's address leads on more than {MAX_REDIRECTS} times", param, "image_fetch_failed")

    def _get(self, url: str, param: str, deadline: float) -> bytes | str:
        """The body, or the address that the host names instead."""
        parts = urlsplit(url)
        address, port = self._checked(parts, param)
        connection = _connection(parts, address, port, deadline)
        with _closed_at(connection, deadline):
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            headers = {"accept": "image/*", "accept-encoding": "identity", "user-agent": "dreamllm"}
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            location = response.getheader("location")
            if response.status in _REDIRECTS and location:
                return urljoin(url, location)
            if response.status != 200:
                raise bad_request(f"a picture's host answered {response.status}", param, "image_fetch_failed")
            return self._read(response, param)

    def _checked(self, parts: SplitResult, param: str) -> tuple[str, int]:
        """An address of the host that may be connected to, and the port."""
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise bad_request("a picture's address must be http(s)://host/path", param, "invalid_image_url")
        port = parts.port or (443 if parts.scheme == "https" else 80)
        addresses = self._resolve(parts.hostname, port)
        if not addresses or not all(self._allowed(address) for address in addresses):
            raise bad_request("a picture's host is not on the public internet", param, "image_address_refused")
        return addresses[0], port

    def _read(self, response: http.client.HTTPResponse, param: str) -> bytes:
        most = self._limits.max_picture_bytes
        body = bytearray()
        while chunk := response.read1(_CHUNK):
            body += chunk
            if len(body) > most:
                raise bad_request(f"a fetched picture has more than {most} bytes", param, "image_too_large")
        return bytes(body)


def _connection(parts: SplitResult, address: str, port: int, deadline: float) -> http.client.HTTPConnection:
    """A connection to `address`, which calls it by the host's name."""
    host = parts.hostname or ""
    connection = http.client.HTTPConnection(host, port)
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    plain = socket.create_connection((address, port), timeout=seconds)
    try:
        secure = parts.scheme == "https"
        connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=host) if secure else plain
    except BaseException:
        plain.close()
        raise
    return connection


@contextmanager
def _closed_at(connection: http.client.HTTPConnection, deadline: float) -> Iterator[None]:
    """Shuts the connection at the deadline, whatever a slow host trickles, and closes it at the end."""
    sock = connection.sock

    def shut() -> None:
        with suppress(OSError):  # it may have ended by itself
            sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), shut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        connection.close()
