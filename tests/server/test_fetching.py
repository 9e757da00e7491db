"""Pictures by address: only from the public internet, within limits."""

import socket
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dreamllm.server import Limits
from dreamllm.server.errors import ApiError
from dreamllm.server.fetching import Fetcher, is_public
from tests.server.support import CHAT, PATIENCE, Scripted, chat, encoded, serving
from tests.tiny import random_picture

PICTURE = encoded(random_picture(1))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.9.9.9", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1",
        "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::",
        "2001:0:4136:e378:8000:63bf:80ff:fffe", "2001:db8::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"]
)
def test_addresses_that_are_public(address):
    assert is_public(address)


class Host(BaseHTTPRequestHandler):
    """Answers by the path; `seen` notes which hosts were asked for."""

    protocol_version = "HTTP/1.0"

    def do_GET(self):
        self.server.seen.append(self.headers["host"])
        kind, _, argument = self.path[1:].partition("/")
        if kind == "picture":
            self.reply(200, PICTURE)
        elif kind == "to":
            self.reply(302, b"", location=f"http://{argument}")
        elif kind == "round":
            self.reply(307, b"", location="/round")
        elif kind == "endless":
            self.reply(200, b"")
            with suppress(OSError):  # until the other side has had enough
                while not self.server.stopping.is_set():
                    self.wfile.write(b"x" * 65536)
        elif kind == "silent":
            self.server.stopping.wait(PATIENCE)
        else:
            self.reply(404, b"")

    def reply(self, status, body, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def host():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    server.seen, server.stopping = [], threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.stopping.set()
    server.shutdown()
    server.server_close()


NAMES = {
    "good.test": ["127.0.0.1"],
    "mixed.test": ["127.0.0.1", "10.0.0.1"],
    "inner.test": ["10.0.0.1"],
    "none.test": [],
}


def fetcher(**limits):
    """One for which 127.0.0.1 is the only public address, and which knows the names above."""

    def resolve(name, port):
        if name not in NAMES:
            raise socket.gaierror("unknown host")
        return NAMES[name]

    return Fetcher(Limits(**limits), resolve, lambda address: address == "127.0.0.1")


def fetch(host, path, name="good.test", **limits):
    return fetcher(**limits).fetch(f"http://{name}:{host.server_port}/{path}", "field")


def refusal(host, path, name="good.test", **limits):
    with pytest.raises(ApiError) as refused:
        fetch(host, path, name, **limits)
    assert refused.value.status == 400
    assert refused.value.param == "field"
    return refused.value


def test_a_picture_is_fetched_from_the_address_that_was_checked(host):
    assert fetch(host, "picture") == PICTURE
    assert host.seen == [f"good.test:{host.server_port}"]


def test_redirects_are_followed_and_checked(host):
    port = host.server_port
    assert fetch(host, f"to/good.test:{port}/picture") == PICTURE
    for target in ("inner.test/x", "mixed.test/x", "none.test/x"):
        assert refusal(host, f"to/{target}").code == "image_address_refused"
    assert "more than 3 times" in refusal(host, "round").message


@pytest.mark.parametrize("name", ["inner.test", "mixed.test", "none.test"])
def test_hosts_with_any_private_address_are_refused_unasked(host, name):
    assert refusal(host, "picture", name).code == "image_address_refused"
    assert host.seen == []


def test_what_goes_wrong_is_said_without_details(host):
    assert refusal(host, "nothing").message == "a picture's host answered 404"
    assert "gaierror" in refusal(host, "picture", "unknown.test").message
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ApiError, match="ConnectionRefusedError"):
        fetcher().fetch(f"http://good.test:{port}/", "field")


def test_limits_of_bytes_and_time(host):
    assert "more than 100000 bytes" in refusal(host, "endless", max_picture_bytes=100_000).message
    assert "within 1 seconds" in refusal(host, "silent", fetch_seconds=1).message


@pytest.mark.parametrize(
    "url", ["ftp://good.test/x", "http://", "http://user@good.test/", "http://good.test:99999/", "http://[::1"]
)
def test_addresses_that_are_none(url):
    with pytest.raises(ApiError):
        fetcher().fetch(url, "field")


def test_a_server_that_may_fetch_shows_the_picture_to_the_model(host):
    backend = Scripted()
    jobs = []
    backend._script = lambda job: (jobs.append(job), job.answer("ok"))
    with serving(backend, fetcher=fetcher()) as address:
        part = {"type": "image_url", "image_url": {"url": f"http://good.test:{host.server_port}/picture"}}
        assert address.post(CHAT, chat([part])).status == 200
        assert jobs[0].work.prompt.pictures()[0].source.tobytes() == random_picture(1).tobytes()
        part["image_url"]["url"] = "http://inner.test/picture"
        assert address.post(CHAT, chat([part])).error["param"] == "messages[0].content[0].image_url.url"


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/x",
        "http://localhost/x",
        "http://[::1]/x",
        "http://169.254.169.254/latest",
        "http://2130706433/",
        "http://0x7f.1/",
    ],
)
def test_the_server_s_own_fetcher_reaches_no_private_host(url):
    with pytest.raises(ApiError) as refused:
        Fetcher(Limits()).fetch(url, "field")
    assert refused.value.code in ("image_address_refused", "image_fetch_failed")
