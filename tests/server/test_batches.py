"""The backend on `Engine.answers`."""

import queue
import threading
from dataclasses import replace

import pytest

from dreamllm.documents import prompt
from dreamllm.inference import GenerationOptions
from dreamllm.server import BatchBackend, Failed, Finished, PictureDrawn, Started, TextPiece, Work
from tests.server.conftest import QUICK
from tests.server.support import PATIENCE

WRITE = GenerationOptions(max_new_tokens=8, pictures="forbid")
DRAW = GenerationOptions(max_new_tokens=3, pictures="force", max_pictures=1, drawing=QUICK)


@pytest.fixture
def backend(engine):
    backend = BatchBackend(engine, max_batch=4)
    yield backend
    backend.close()


class Events(queue.Queue):
    """The events of one work."""

    def rest(self):
        """All that come, the end included."""
        events = [self.get(timeout=PATIENCE)]
        while not isinstance(events[-1], Finished | Failed):
            events.append(self.get(timeout=PATIENCE))
        return events


def submit(backend, text, options=WRITE):
    events = Events()
    return events, backend.submit(Work(prompt(text), options), events.put)


@pytest.fixture
def gate(engine, monkeypatch):
    """Calls of the engine wait here, after they have been noted."""

    class Gate:
        open = threading.Event()
        calls: queue.Queue = queue.Queue()

    answers = engine.answers

    def waiting(prompts, *arguments, **named):
        Gate.calls.put([p.text() for p in prompts])
        assert Gate.open.wait(PATIENCE)
        return answers(prompts, *arguments, **named)

    monkeypatch.setattr(engine, "answers", waiting)
    Gate.open.clear()
    Gate.calls = queue.Queue()
    yield Gate
    Gate.open.set()


def test_events_are_the_engine_s_answer(backend, engine):
    events = submit(backend, "The license", replace(DRAW, seed=5))[0].rest()
    expected = engine.answer(prompt("The license"), replace(DRAW, seed=5))
    started, drawn, text, finished = events
    assert isinstance(started, Started)
    assert isinstance(drawn, PictureDrawn)
    assert drawn.image.tobytes() == expected.pictures[0].tobytes()
    assert text == TextPiece(expected.text)
    assert finished.reason == expected.stopped
    assert finished.usage.completion_tokens == len(expected.token_ids)
    assert finished.usage.prompt_tokens == len(engine.processor.encode(prompt("The license")))
    assert finished.usage.pictures == 1


def test_waiting_work_of_equal_options_is_answered_together_each_with_its_seed(backend, engine, gate):
    first, _ = submit(backend, "first")
    assert gate.calls.get(timeout=PATIENCE) == ["first"]
    hot = replace(WRITE, temperature=2.0)
    waiting = [submit(backend, f"text {i}", replace(hot, seed=i))[0] for i in range(3)]
    other, _ = submit(backend, "other", DRAW)
    waiting += [submit(backend, f"text {i}", replace(hot, seed=i))[0] for i in range(3, 6)]
    assert backend.load().waiting == 7
    assert backend.load().running == 1
    gate.open.set()
    answers = [events.rest() for events in waiting]
    assert first.rest()
    assert other.rest()
    calls = [gate.calls.get(timeout=PATIENCE) for _ in range(3)]
    assert calls == [["text 0", "text 1", "text 2", "text 3"], ["other"], ["text 4", "text 5"]]
    for i, events in enumerate(answers):
        alone = engine.answer(prompt(f"text {i}"), replace(hot, seed=i))
        assert events[1] == TextPiece(alone.text)


def test_work_that_is_refused_does_not_spoil_that_beside_it(backend, gate):
    submit(backend, "first")
    gate.calls.get(timeout=PATIENCE)
    good, _ = submit(backend, "good", DRAW)
    long, _ = submit(backend, "license " * 248, DRAW)
    endless, _ = submit(backend, "license " * 500, DRAW)
    gate.open.set()
    assert isinstance(good.rest()[-1], Finished)
    for refused in (long.rest()[-1], endless.rest()[-1]):
        assert isinstance(refused, Failed)
        assert refused.fault == "request"


def test_an_error_of_the_server_is_no_refusal_and_not_the_end(backend, engine, monkeypatch, caplog):
    answers = engine.answers
    monkeypatch.setattr(engine, "answers", lambda *_: 1 / 0)
    failed = submit(backend, "x")[0].rest()[-1]
    assert failed.fault == "server"
    assert "ZeroDivisionError" in caplog.text
    monkeypatch.setattr(engine, "answers", answers)
    assert isinstance(submit(backend, "x")[0].rest()[-1], Finished)
    assert backend.alive()


def test_waiting_work_that_is_cancelled_ends_at_once(backend, gate):
    submit(backend, "first")
    gate.calls.get(timeout=PATIENCE)
    events, handle = submit(backend, "second")
    handle.cancel()
    assert [event.reason for event in events.rest()] == ["cancelled"]
    assert backend.load().waiting == 0
    handle.cancel()  # again: nothing happens


@pytest.mark.parametrize(
    "options", [replace(WRITE, max_new_tokens=200), replace(DRAW, drawing=replace(QUICK, steps=900))]
)
def test_running_work_stops_at_the_next_step_after_all_of_it_was_cancelled(backend, engine, options):
    steps = []
    reached = threading.Event()

    def count(*_):
        steps.append(1)
        reached.set()

    part = engine.model.get_output_embeddings() if options.pictures == "forbid" else engine.model.unet
    hook = part.register_forward_hook(count)
    try:
        events, handle = submit(backend, "x", options)
        assert reached.wait(PATIENCE)
        handle.cancel()
        assert events.rest()[-1].reason == "cancelled"
    finally:
        hook.remove()
    assert len(steps) < 100


def test_one_cancelled_work_does_not_stop_those_beside_it(backend, gate):
    submit(backend, "first")
    gate.calls.get(timeout=PATIENCE)
    left, handle = submit(backend, "left", DRAW)
    stays, _ = submit(backend, "stays", DRAW)
    gate.open.set()
    gate.calls.get(timeout=PATIENCE)
    handle.cancel()
    assert stays.rest()[-1].reason in ("end", "length")
    assert left.rest()[-1].reason == "cancelled"


def test_closing_ends_everything(engine):
    backend = BatchBackend(engine, max_batch=1)
    events = [submit(backend, "x", replace(WRITE, max_new_tokens=200))[0] for _ in range(3)]
    backend.close()
    assert all(one.rest()[-1].reason == "cancelled" for one in events[1:])
    assert isinstance(events[0].rest()[-1], Finished)
    assert not backend.alive()
    assert submit(backend, "x")[0].rest()[-1].fault == "closed"


def test_max_batch_must_be_positive(engine):
    with pytest.raises(ValueError, match="at least 1, not 0"):
        BatchBackend(engine, 0)
