"""Malformed and hostile requests: each is answered 200 or 4xx with a reason, and the server goes on."""

import copy
import json
import logging
import random
import socket

import pytest

from dreamllm.server import EngineBackend, Limits
from tests.server.support import (
    CHAT,
    COMPLETIONS,
    IMAGES,
    PATIENCE,
    chat,
    data_url,
    encoded,
    image_part,
    serving,
    text_part,
)
from tests.tiny import random_picture

LIMITS = Limits(
    max_new_tokens=3, max_steps=3, max_size=32, max_pictures_out=2, max_picture_pixels=100_000, max_body_bytes=200_000
)
KINDS = ("PNG", "JPEG", "GIF", "WEBP", "BMP")


def valid(rng):
    """A path and a request that would be answered."""
    if rng.random() < 0.3:
        return IMAGES, {"prompt": "seven", "n": 1, "size": "8x8", "seed": 3, "steps": 1, "guidance_scale": 2.0}
    kind = rng.choice(KINDS)
    if rng.random() < 0.2:
        prompt = f"One ![x]({data_url(encoded(random_picture(rng.randrange(99)), kind), kind.lower())}) two"
        return COMPLETIONS, {
            "model": "scripted",
            "prompt": prompt,
            "max_tokens": 2,
            "stream": False,
            "pictures": "forbid",
        }
    picture = image_part(encoded(random_picture(rng.randrange(99)), kind), kind.lower())
    messages = chat([text_part("What is"), picture, text_part("this?")], "A digit.", "And now?")["messages"]
    drawing = {"steps": 1, "scheduler": "ddim", "size": 8}
    fields = {"max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["x"], "stream": False, "n": 1}
    return CHAT, {"model": "scripted", "messages": messages, **fields, "pictures": "allow", "drawing": drawing}


def any_value(rng, depth=0):
    choices = [
        lambda: None,
        lambda: rng.random() < 0.5,
        lambda: rng.choice([-1, 0, 1, 2, 7, 2**31, 2**63, 10**30, -(10**30)]),
        lambda: rng.choice([0.0, -0.5, 1e-308, 1e308, 0.5]),
        lambda: rng.choice(["", " ", "x", "\x00", "\u202e", "<image>", "</s>", "../../etc/passwd", "8x8", "é" * 500]),
        lambda: rng.choice(["http://127.0.0.1/", "file:///etc/passwd", "data:image/png;base64,", "data:,x"]),
        lambda: [any_value(rng, depth + 1) for _ in range(rng.randrange(4))] if depth < 3 else [],
        lambda: (
            {str(any_value(rng, 9)): any_value(rng, depth + 1) for _ in range(rng.randrange(4))} if depth < 3 else {}
        ),
        lambda: [] if rng.random() < 0.9 else nested(rng.randrange(300)),
    ]
    return rng.choice(choices)()


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def change_value(rng, value):
    """Replaces, removes or adds something somewhere."""
    value = copy.deepcopy(value)
    *way, last = rng.choice([path for path in places(value) if path])
    holder = value
    for step in way:
        holder = holder[step]
    action = rng.random()
    if action < 0.6:
        holder[last] = any_value(rng)
    elif action < 0.8:
        del holder[last]
    elif isinstance(holder, dict):
        holder[str(any_value(rng, 9))] = any_value(rng)
    else:
        holder.append(any_value(rng))
    return value


def change_bytes(rng, data):
    data = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(data) + 1)
        action = rng.random()
        if action < 0.4 and at < len(data):
            data[at] = rng.randrange(256)
        elif action < 0.6:
            del data[at:]
        elif action < 0.8:
            data[at:at] = rng.randbytes(rng.randrange(8))
        else:
            del data[at : at + rng.randrange(16)]
        if not data:
            break
    return bytes(data)


def hostile_picture(rng):
    data = encoded(random_picture(rng.randrange(99), rng.choice([1, 8, 16, 60])), rng.choice(KINDS))
    return change_bytes(rng, data) if rng.random() < 0.9 else rng.randbytes(rng.randrange(200))


def send_garbage(rng, address):
    """Bytes that are hardly HTTP; returns the status, if any."""
    lines = [b"GET / HTTP/1.1", b"POST /v1/chat/completions HTTP/1.1", rng.randbytes(30), b"Host: x", b"Host:"]
    lines += [
        b"Content-Length: -1",
        b"Content-Length: x",
        b"Transfer-Encoding: chunked",
        b"\x00: \x00",
        b": x",
        b"A" * 9000,
    ]
    data = b"\r\n".join(rng.choices(lines, k=rng.randrange(1, 8))) + b"\r\n\r\n" + rng.randbytes(20)
    with socket.create_connection(("127.0.0.1", address.port), timeout=PATIENCE) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(100)
    return int(answer.split()[1]) if answer else None


def send_request(rng, address):
    """One malformed request; returns the reply."""
    path, value = valid(rng)
    headers = {"content-type": "application/json"}
    action = rng.random()
    if action < 0.5:
        for _ in range(rng.randrange(1, 4)):
            value = change_value(rng, value) or value
    body = json.dumps(value).encode()
    if 0.5 <= action < 0.75:
        path, body = CHAT, json.dumps(chat([image_part(hostile_picture(rng)), text_part("?")], max_tokens=2)).encode()
    elif 0.75 <= action < 0.9:
        body = change_bytes(rng, body)
    elif action >= 0.9:
        name = rng.choice(["content-type", "content-encoding", "authorization", "x-request-id", "accept", "expect"])
        headers[name] = rng.choice(["", "gzip", "text/plain", "\xff", "x" * 500, "application/json; charset=x"])
        path = rng.choice([path, "/v1/models/..%2f..%2fetc", "/%00", "//", path + "/", path + "?x=%ff"])
    method = "POST" if rng.random() < 0.95 else rng.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])
    return address.request(method, path, body, headers), method, body


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_each_request_is_answered_and_the_server_goes_on(engine, served, caplog, count):
    rng = random.Random(count)
    caplog.set_level(logging.ERROR, "dreamllm")
    statuses = {}
    with serving(EngineBackend(engine), LIMITS, served) as address:
        for _ in range(count):
            if rng.random() < 0.05:
                assert send_garbage(rng, address) in (None, *range(400, 432))
                continue
            reply, method, body = send_request(rng, address)
            statuses[reply.status] = statuses.get(reply.status, 0) + 1
            assert reply.status == 200 or 400 <= reply.status < 499, (reply, body)
            if reply.status != 200 and method != "HEAD":
                assert reply.error["message"], body
        path, value = valid(rng)
        assert address.post(path, value).status == 200
        assert address.get("/health").status == 200
        assert address.service.backend.load().running == 0
    assert not caplog.records
    assert {200, 400, 404, 405, 415} <= statuses.keys()


def test_the_requests_above_would_be_answered_were_they_not_changed(engine, served):
    rng = random.Random(1)
    with serving(EngineBackend(engine), LIMITS, served) as address:
        for _ in range(6):
            reply = address.post(*valid(rng))
            assert reply.status == 200, reply.body
