"""The backend on the engine."""

import queue
import threading
from dataclasses import replace

import pytest

from dreamllm.documents import prompt
from dreamllm.inference import Engine, GenerationOptions
from dreamllm.server import EngineBackend, Failed, Finished, Load, PictureDrawn, Started, TextPiece, Work
from tests.server.conftest import QUICK
from tests.server.support import PATIENCE

WRITE = GenerationOptions(max_new_tokens=8, pictures="forbid")
LONG = replace(WRITE, max_new_tokens=240)
DRAW = GenerationOptions(max_new_tokens=3, pictures="force", max_pictures=1, drawing=QUICK)


@pytest.fixture(scope="module")
def pair_engine(engine):
    """An engine of its own, for two requests at a time."""
    return Engine(engine.model, engine.processor, batch_size=2)


@pytest.fixture
def backend(pair_engine):
    backend = EngineBackend(pair_engine)
    yield backend
    backend.close()


class Events(queue.Queue):
    """The events of one work."""

    def next(self):
        return self.get(timeout=PATIENCE)

    def rest(self):
        """All that come, the end included."""
        events = [self.next()]
        while not isinstance(events[-1], Finished | Failed):
            events.append(self.next())
        return events


def submit(backend, text, options=WRITE):
    events = Events()
    return events, backend.submit(Work(prompt(text), options), events.put)


@pytest.fixture
def steps(pair_engine, monkeypatch):
    """The engine takes a step whenever one is allowed, with `steps.release()`; `steps.free` lets it go."""
    step, allowed, begun = pair_engine.step, threading.Semaphore(0), threading.Semaphore(0)

    class Steps:
        free = False

        def release(self, count=1):
            for _ in range(count):
                allowed.release()

        def let_go(self):
            self.free = True
            allowed.release()

        def wait(self):
            """Until a step waits to be allowed."""
            assert begun.acquire(timeout=PATIENCE)

    steps = Steps()

    def waiting():
        begun.release()
        if not steps.free:
            assert allowed.acquire(timeout=PATIENCE)
        return step()

    monkeypatch.setattr(pair_engine, "step", waiting)
    yield steps
    steps.let_go()


def text_of(events):
    return "".join(event.text for event in events if isinstance(event, TextPiece))


def test_events_are_the_engine_s_answer_piece_by_piece(backend, engine):
    options = replace(DRAW, max_new_tokens=30, seed=5)
    events = submit(backend, "The license", options)[0].rest()
    expected = engine.answer(prompt("The license"), options)
    assert isinstance(events[0], Started)
    assert isinstance(events[1], PictureDrawn)
    assert events[1].image.tobytes() == expected.pictures[0].tobytes()
    assert len(events) > 5
    # A random model writes bytes that make no character; what the engine tells from there on is its own.
    characters = expected.text.partition("\ufffd")[0]
    assert characters
    assert text_of(events).startswith(characters)
    finished = events[-1]
    assert finished.document.text() == expected.text
    assert finished.reason == expected.stopped
    assert finished.usage.completion_tokens == len(expected.token_ids)
    assert finished.usage.prompt_tokens == len(engine.processor.encode(prompt("The license")))
    assert finished.usage.pictures == 1


def test_stop_strings_end_the_work(backend, engine):
    text = engine.answer(prompt("The license"), LONG).text
    stop = text[len(text) // 2 :][:3]
    events = submit(backend, "The license", replace(LONG, stop=(stop,)))[0].rest()
    assert events[-1].reason == "stop"
    assert events[-1].document.text() == text[: text.index(stop)]
    assert stop not in text_of(events)


def test_a_request_joins_those_that_run_and_leaves_before_them(backend, steps):
    long, handle = submit(backend, "long", LONG)
    steps.wait()
    steps.release()
    short, _ = submit(backend, "short", WRITE)
    steps.release(20)
    assert short.rest()[-1].reason in ("end", "length")
    assert backend.load() == Load(0, 1)
    handle.cancel()
    steps.let_go()
    assert long.rest()[-1].reason == "cancelled"


def test_as_many_run_as_the_engine_takes(backend, steps):
    jobs = [submit(backend, f"text {i}", LONG) for i in range(4)]
    steps.wait()
    steps.release(2)
    steps.wait()
    steps.wait()
    assert backend.capacity() == 2
    assert backend.load() == Load(2, 2)
    for _, handle in jobs:
        handle.cancel()
    assert backend.load() == Load(0, 0)
    steps.let_go()
    assert {events.rest()[-1].reason for events, _ in jobs} == {"cancelled"}


def test_each_answer_is_what_it_is_alone(backend, engine):
    options = [replace(WRITE, temperature=2.0, seed=i) for i in range(4)] + [replace(DRAW, seed=9)]
    waiting = [submit(backend, f"text {i}", own)[0] for i, own in enumerate(options)]
    for i, (events, own) in enumerate(zip(waiting, options, strict=True)):
        assert events.rest()[-1].document.text() == engine.answer(prompt(f"text {i}"), own).text


def test_work_that_is_refused_does_not_spoil_that_beside_it(backend):
    good, _ = submit(backend, "good", DRAW)
    for options in (
        DRAW,
        replace(DRAW, drawing=replace(QUICK, size=9)),
        replace(DRAW, drawing=replace(QUICK, steps=1001)),
    ):
        text = "license " * 248 if options is DRAW else "x"
        refused = submit(backend, text, options)[0].rest()[-1]
        assert isinstance(refused, Failed)
        assert refused.fault == "request"
    assert isinstance(good.rest()[-1], Finished)


def test_an_error_of_the_server_is_no_refusal_and_not_the_end(backend, pair_engine, monkeypatch, caplog):
    step = pair_engine.step
    monkeypatch.setattr(pair_engine, "step", lambda: 1 / 0)
    assert submit(backend, "x")[0].rest()[-1].fault == "server"
    assert "ZeroDivisionError" in caplog.text
    monkeypatch.setattr(pair_engine, "step", step)
    assert isinstance(submit(backend, "x")[0].rest()[-1], Finished)
    monkeypatch.setattr(pair_engine, "submit", lambda *_: 1 / 0)
    assert submit(backend, "x")[0].rest()[-1].fault == "server"
    assert backend.alive()


def test_an_error_of_a_pass_ends_what_took_part(backend, pair_engine, monkeypatch):
    append = pair_engine._append
    monkeypatch.setattr(pair_engine, "_append", lambda: 1 / 0)
    assert submit(backend, "x")[0].rest()[-1].fault == "server"
    monkeypatch.setattr(pair_engine, "_append", append)
    assert isinstance(submit(backend, "x")[0].rest()[-1], Finished)


@pytest.mark.parametrize("options", [LONG, replace(DRAW, drawing=replace(QUICK, steps=900))])
def test_work_that_is_cancelled_ends_before_the_next_step(backend, steps, options):
    events, handle = submit(backend, "x", options)
    steps.wait()
    steps.release(3)
    for _ in range(3):
        steps.wait()
    handle.cancel()
    steps.release(1)  # one may be under way
    steps.wait()
    steps.release(1)
    assert events.rest()[-1].reason == "cancelled"
    handle.cancel()  # again: nothing happens
    assert backend.load() == Load(0, 0)


def test_closing_ends_everything(engine):
    backend = EngineBackend(Engine(engine.model, engine.processor, batch_size=1))
    events = [submit(backend, "x", LONG)[0] for _ in range(3)]
    backend.close()
    assert all(one.rest()[-1].reason == "cancelled" for one in events[1:])
    assert isinstance(events[0].rest()[-1], Finished)
    assert not backend.alive()
    assert submit(backend, "x")[0].rest()[-1].fault == "closed"
