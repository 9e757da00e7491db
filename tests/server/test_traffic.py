"""Full queues, deadlines, clients that leave, and the end of the server."""

import json
import threading

import pytest

from dreamllm.server import Failed, Finished, Limits, Started, TextPiece, Usage
from tests.server.support import CHAT, IMAGES, PATIENCE, chat, hello, serving


def in_thread(function):
    """Calls `function` beside the test; the result is awaited with `.result()`."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()

    def result():
        thread.join(PATIENCE)
        return results[0]

    return result


def test_a_full_queue_is_429_until_a_place_is_free(backend):
    with serving(backend, max_queue=1) as address:  # two that run and one that waits
        waiting = [in_thread(lambda: address.post(CHAT, chat())) for _ in range(3)]
        jobs = [backend.next_job() for _ in range(3)]
        reply = address.post(CHAT, chat())
        assert reply.status == 429
        assert int(reply.headers["retry-after"]) >= 1
        assert reply.error["code"] == "queue_full"
        assert address.get("/health").status == 200
        for job in jobs:
            job.answer("done")
        assert [result().status for result in waiting] == [200] * 3
        backend._script = hello
        assert address.post(CHAT, chat()).status == 200


def test_a_client_that_sends_much_still_reads_429(backend):
    with serving(backend, max_queue=0) as address:
        held = [in_thread(lambda: address.post(CHAT, chat())) for _ in range(2)]
        jobs = [backend.next_job() for _ in range(2)]
        assert address.post(CHAT, chat("x" * 5_000_000)).status == 429
        for job in jobs:
            job.answer("done")
        assert [result().status for result in held] == [200, 200]


@pytest.mark.parametrize("stream", [False, True])
def test_the_deadline_ends_an_answer(backend, stream):
    with serving(backend, Limits(request_seconds=1)) as address:
        reply = address.post(CHAT, chat(stream=stream))
        assert reply.status == 504
        assert reply.headers["x-should-retry"] == "false"
        assert backend.next_job().cancelled.wait(PATIENCE)


def test_the_deadline_ends_a_stream_that_has_begun(backend):
    with serving(backend, Limits(request_seconds=2)) as address:
        reply = in_thread(lambda: address.post(CHAT, chat(stream=True)))
        job = backend.next_job()
        job.emit(Started())
        job.emit(TextPiece("One"))
        lines = reply().body.decode().split("\n\n")
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "timeout"
        assert "[DONE]" not in reply().body.decode()
        assert job.cancelled.wait(PATIENCE)


def test_a_stream_comes_piece_by_piece(backend):
    with serving(backend) as address, address.send(CHAT, chat(stream=True)) as connection:
        job = backend.next_job()
        job.emit(Started())
        received = b""
        for word in (b"One", b"Two", b"Three"):
            job.emit(TextPiece(word.decode()))
            while word not in received:  # nothing else is sent before it arrives
                received += connection.recv(65536)
        job.emit(Finished("end", Usage(1, 3)))
        while b"[DONE]" not in received:
            received += connection.recv(65536)


@pytest.mark.parametrize(
    ("failed", "status", "code"),
    [
        (Failed("the prompt is too long", "request"), 400, "invalid_request"),
        (Failed("secret", "server"), 500, "internal_error"),
        (Failed("closing", "closed"), 503, "shutting_down"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_work_that_fails(backend, failed, status, code, stream):
    backend._script = lambda job: job.emit(failed)
    with serving(backend) as address:
        reply = address.post(CHAT, chat(stream=stream))
        assert reply.status == status
        assert reply.error["code"] == code
        assert b"secret" not in reply.body
        assert address.post(IMAGES, {"prompt": "seven"}).status == status


def test_work_that_fails_in_a_stream(backend):
    def script(job):
        job.emit(TextPiece("One"))
        job.emit(Failed("secret", "server"))

    backend._script = script
    with serving(backend) as address:
        reply = address.post(CHAT, chat(stream=True))
        assert reply.status == 200
        assert json.loads(reply.body.decode().split("\n\n")[-2][6:])["error"]["code"] == "internal_error"


def leave(address, backend, stream, begun):
    """A client that leaves before or in the middle of its answer; its work must end."""
    with address.send(CHAT, chat(stream=stream)) as connection:
        job = backend.next_job()
        if begun:
            job.emit(Started())
            job.emit(TextPiece("One"))
        if begun and stream:
            assert connection.recv(65536)
    assert job.cancelled.wait(PATIENCE)


@pytest.mark.parametrize("times", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_clients_that_leave_free_their_place(backend, times):
    with serving(backend, max_queue=0) as address:  # a place that stuck would be missed after two
        for number in range(times):
            leave(address, backend, stream=number % 2 == 0, begun=number % 3 != 0)
        backend._script = hello
        held = address.service._places
        for _ in range(held + 1):
            assert address.post(CHAT, chat()).status == 200
        assert b'status="499"' in address.get("/metrics").body


def test_a_client_that_leaves_while_sending(backend):
    with serving(backend, max_queue=0) as address:
        for _ in range(5):
            connection = address.connect()
            connection.putrequest("POST", CHAT)
            connection.putheader("content-type", "application/json")
            connection.putheader("content-length", "1000")
            connection.endheaders(b"{")
            connection.close()
        backend._script = hello
        while address.post(CHAT, chat()).status == 429:  # until the server has seen them leave
            pass
        assert [address.post(CHAT, chat()).status for _ in range(3)] == [200] * 3


def test_stopping_finishes_what_was_accepted_and_refuses_what_is_new(backend):
    with serving(backend) as address:
        whole = in_thread(lambda: address.post(CHAT, chat()))
        stream = in_thread(lambda: address.post(CHAT, chat(stream=True)))
        jobs = [backend.next_job(), backend.next_job()]
        address.server.stop()
        while address.get("/health").status == 200:
            pass
        reply = address.post(CHAT, chat())
        assert reply.status == 503
        assert reply.error["code"] == "shutting_down"
        assert "retry-after" in reply.headers
        for job in jobs:
            job.answer("Done.")
        assert whole().json["choices"][0]["message"]["content"] == "Done."
        assert b"[DONE]" in stream().body
        assert address.ended.wait(PATIENCE)
        assert backend.closed


def test_stopping_does_not_wait_for_ever(backend):
    with serving(backend, Limits(drain_seconds=1)) as address:
        reply = in_thread(lambda: address.post(CHAT, chat()))
        job = backend.next_job()
        address.server.stop()
        assert reply().status == 503
        assert job.cancelled.is_set()
        assert address.ended.wait(PATIENCE)


def test_health_tells_of_a_dead_backend(backend):
    with serving(backend) as address:
        assert address.get("/health").json == {"status": "ok"}
        backend.closed = True
        assert address.get("/health").status == 500


def test_metrics(backend):
    backend._script = lambda job: job.answer("ok", usage=Usage(7, 5, 0))
    with serving(backend) as address:
        address.post(CHAT, chat())
        address.post(CHAT, b"{")
        address.get("/a/secret/path")
        text = address.get("/metrics").body.decode()
    assert 'dreamllm_requests_total{route="/v1/chat/completions",status="200"} 1.0' in text
    assert 'dreamllm_requests_total{route="/v1/chat/completions",status="400"} 1.0' in text
    assert 'dreamllm_requests_total{route="other",status="404"} 1.0' in text
    assert 'dreamllm_tokens_total{kind="prompt"} 7.0' in text
    assert 'dreamllm_tokens_total{kind="completion"} 5.0' in text
    assert "dreamllm_queue_seconds_count 1.0" in text
    assert "dreamllm_waiting 0.0" in text
    assert "secret" not in text
