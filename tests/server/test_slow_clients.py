"""Clients that send or read slowly, or not at all, cost the server neither a place nor memory for long."""

import json
import socket

import pytest

from dreamllm.server import Limits
from tests.server.support import CHAT, PATIENCE, chat, hello, serving

HEAD = b"GET /health HTTP/1.1\r\nHost: x\r\n"
"""Without the empty line that ends it."""


def post_head(length):
    kind = "Content-Type: application/json"
    return f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n{kind}\r\nContent-Length: {length}\r\n\r\n".encode()


def connect(address):
    return socket.create_connection(("127.0.0.1", address.port), timeout=PATIENCE)


def answer_on(connection):
    received = b""
    while b"\r\n\r\n" not in received or not received.endswith(b"}"):
        received += connection.recv(65536)
    return received


def closed(connection):
    """Waits until the server has closed; a reset is a close, too."""
    try:
        return connection.recv(65536) == b""
    except ConnectionResetError:
        return True


def trickle(connection, data):
    """Sends byte by byte, for ever slower than allowed, until the server closes."""
    connection.settimeout(0.02)
    return any(ended_after(connection, data) for _ in range(int(PATIENCE / 0.02)))


def ended_after(connection, data):
    try:
        connection.sendall(data)
        return connection.recv(65536) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


@pytest.mark.parametrize("begun", [b"", b"GET", HEAD])
def test_a_head_that_does_not_come_is_not_waited_for(backend, begun):
    with serving(backend, Limits(head_seconds=1)) as address, connect(address) as connection:
        connection.sendall(begun)
        assert closed(connection)


def test_a_head_that_trickles_is_not_waited_for(backend):
    with serving(backend, Limits(head_seconds=1)) as address, connect(address) as connection:
        connection.sendall(HEAD)
        assert trickle(connection, b"X")


def test_nor_is_the_second_head_of_a_connection(backend):
    with serving(backend, Limits(head_seconds=1)) as address, connect(address) as connection:
        connection.sendall(HEAD + b"\r\n")
        assert b'{"status": "ok"}' in answer_on(connection)
        connection.sendall(HEAD)
        assert trickle(connection, b"X")


def test_an_idle_connection_ends(backend):
    with serving(backend, Limits(keep_alive_seconds=1)) as address, connect(address) as connection:
        connection.sendall(HEAD + b"\r\n")
        assert b'{"status": "ok"}' in answer_on(connection)
        assert closed(connection)


def test_an_answer_may_take_longer_than_a_head(backend):
    with serving(backend, Limits(head_seconds=1)) as address, address.send(CHAT, chat()) as connection:
        job = backend.next_job()
        with connect(address) as idle:  # a second passes
            assert closed(idle)
        job.answer("Done.")
        assert b"Done." in answer_on(connection)


def test_a_body_that_trickles_gives_its_place_back(backend):
    backend._script = hello
    with serving(backend, Limits(body_seconds=1), max_queue=0) as address:
        slow = [connect(address) for _ in range(2)]
        for connection in slow:
            connection.sendall(post_head(99) + b"{")
        for connection in slow:
            assert b"408" in connection.recv(65536).partition(b"\r\n")[0]
            connection.close()
        assert address.post(CHAT, chat()).status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_does_not_read_is_let_go(backend, stream):
    """What is ready for it would stay in memory, and a stream's work would go on."""
    with serving(backend, Limits(send_seconds=1), max_queue=0) as address:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(PATIENCE)
        connection.connect(("127.0.0.1", address.port))
        body = json.dumps(chat(stream=stream)).encode()
        connection.sendall(post_head(len(body)) + body)
        backend.next_job().answer(*["x" * 2**20] * 16)  # more than the system's buffers take
        with connect(address) as watched:  # which ends after head_seconds at the latest
            watched.settimeout(0.05)
            for _ in range(int(PATIENCE / 0.05)):
                if len(address.server.server_state.connections) <= 1:
                    break
                with pytest.raises(TimeoutError):
                    watched.recv(1)
        assert len(address.server.server_state.connections) <= 1
        connection.close()
        backend._script = hello
        assert [address.post(CHAT, chat()).status for _ in range(3)] == [200] * 3


def test_connections_beyond_the_most_are_closed(backend):
    with serving(backend, Limits(max_connections=3)) as address:
        held = [connect(address) for _ in range(3)]
        for connection in held:  # so that all three have been accepted
            connection.sendall(HEAD + b"\r\n")
            answer_on(connection)
        with connect(address) as surplus:
            assert closed(surplus)
        for connection in held:
            connection.sendall(HEAD + b"\r\n")
            assert b'{"status": "ok"}' in answer_on(connection)
            connection.close()
