"""Attention by the interface, calls between an engine's steps, and examples."""

import base64
import json
import threading
from functools import partial

import numpy as np
import pytest
import torch
from fastapi import FastAPI

from dreamllm.cli import main
from dreamllm.demo.attention import maps_as_json
from dreamllm.demo.examples import read_examples
from dreamllm.demo.routes import add_routes
from dreamllm.documents import Document, Picture, Text
from dreamllm.evaluation.attention import dream_attention, reading_attention
from dreamllm.inference import GenerationOptions
from dreamllm.server import EngineBackend, Finished, Work
from tests.server.conftest import QUICK, engine, model_folder, served
from tests.server.support import PATIENCE, data_url, encoded, serving
from tests.tiny import NUM_QUERIES, random_picture

__all__ = ["engine", "model_folder", "served"]

ATTENTION = "/page/attention"


@pytest.fixture(scope="module")
def page(engine, served):
    backend = EngineBackend(engine)
    with serving(backend, served=served, add_routes=partial(add_routes, backend=backend, examples={})) as address:
        yield address


def decoded(values):
    shape = values["queries"], values["height"], values["width"]
    shares = np.frombuffer(base64.b64decode(values["maps"]), np.uint8).reshape(shape) / 255
    return torch.from_numpy(shares * np.array(values["peaks"])[:, None, None]).float()


def test_attention_is_that_of_the_engine(page, engine):
    picture = random_picture(3)
    prompt = f"The ![p]({data_url(encoded(picture))}) license"
    found = page.post(ATTENTION, {"prompt": prompt, "seed": 4}).json
    document = Document((Text("The "), Picture(picture, comprehension=True), Text(" license")), "error")
    _, drawn = dream_attention(engine, [document], QUICK, [4])
    read = reading_attention(engine, document)
    assert found["seed"] == 4
    torch.testing.assert_close(decoded(found["drawn"]), drawn[0], rtol=0, atol=float(drawn.max()) / 500)
    torch.testing.assert_close(decoded(found["read"][0]), read[0], rtol=0, atol=float(read.max()) / 500)
    assert found["drawn"]["shares"] == pytest.approx(drawn[0].flatten(1).mean(1).tolist())
    assert page.post(ATTENTION, {"prompt": "license"}).json["read"] == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "license " * 500}, "more than the context of 256"),
        ({"prompt": "a", "steps": 251}, "beyond the limit"),
        ({"prompt": "a", "size": 7}, "multiple of"),
        ({"prompt": "a", "colour": "red"}, "unknown or unsupported parameter"),
        ({"prompt": "![x](data:image/png;base64,AAAA)"}, "a picture is not one"),
    ],
)
def test_refusals(page, fields, message):
    reply = page.post(ATTENTION, fields)
    assert reply.status == 400
    assert message in reply.error["message"]


def test_a_peak_of_nothing_is_nothing():
    assert decoded(maps_as_json(torch.zeros(2, 3, 3))).abs().max() == 0


def test_calls_run_between_steps_and_errors_are_theirs(engine):
    backend = EngineBackend(engine)
    told, ended = [], threading.Event()

    def emit(event):
        told.append(event)
        if isinstance(event, Finished):
            ended.set()

    document = Document((Text("The license"),), "error")
    backend.submit(Work(document, GenerationOptions(max_new_tokens=30, pictures="forbid")), emit)
    assert backend.call(lambda mine: mine is engine).result(PATIENCE)
    with pytest.raises(ZeroDivisionError):
        backend.call(lambda mine: 1 / 0).result(PATIENCE)
    assert ended.wait(PATIENCE)
    assert told[-1].document.text() == engine.answer(document, GenerationOptions(30, pictures="forbid")).text
    backend.close()
    assert backend.call(lambda mine: 1).cancelled()


def test_a_call_that_was_cancelled_is_not_made(engine):
    backend = EngineBackend(engine)
    begun, go_on, made = threading.Event(), threading.Event(), []

    def hold(mine):
        begun.set()
        assert go_on.wait(PATIENCE)

    held = backend.call(hold)
    assert begun.wait(PATIENCE)
    waiting = backend.call(lambda mine: made.append(1))
    assert waiting.cancel()
    go_on.set()
    held.result(PATIENCE)
    backend.call(lambda mine: None).result(PATIENCE)
    backend.close()
    assert not made


def test_attention_of_a_server_that_ends(engine, served):
    backend = EngineBackend(engine)
    with serving(backend, served=served, add_routes=partial(add_routes, backend=backend, examples={})) as address:
        backend.close()
        reply = address.post(ATTENTION, {"prompt": "license"})
    assert reply.status == 503
    assert reply.error["code"] == "shutting_down"


def test_the_command_serves_the_page_of_a_model(model_folder, monkeypatch):
    (model_folder / "examples.json").write_text(json.dumps({"chat": ["Hi"]}))
    served = []

    def run(service, keys, listening, add):
        app = FastAPI()
        add(app)
        served.append((service.served.name, keys, [route.path for route in app.routes if hasattr(route, "path")]))
        service.close()

    monkeypatch.setattr("dreamllm.server.running.run", run)
    main(["demo", "--model", str(model_folder), "--name", "mine", "--port", "0"])
    ((name, keys, paths),) = served
    assert (name, keys) == ("mine", None)
    assert {"/", "/page/about", "/page/load", "/page/attention", "/page/page.js", "/page/page.css"} <= set(paths)


def test_examples_are_read_from_the_folder(tmp_path):
    assert read_examples(tmp_path) == {}
    (tmp_path / "examples.json").write_text(json.dumps({"chat": ["Hi"]}))
    assert read_examples(tmp_path) == {"chat": ["Hi"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must hold an object"),
        ('{"talk": []}', "has examples for 'talk'; the page has chat, pictures, document, attention"),
        ('{"chat": "Hi"}', "chat must be a list of texts"),
    ],
)
def test_examples_that_are_none(tmp_path, capsys, text, message):
    (tmp_path / "examples.json").write_text(text)
    with pytest.raises(SystemExit):
        main(["demo", "--model", str(tmp_path)])
    assert message in capsys.readouterr().err


def test_queries_look_at_everything_they_see(engine):
    """Over text, pictures and queries together the shares sum to 1."""
    document = Document((Text("The "), Picture(random_picture(3), comprehension=True)), "error")
    read = reading_attention(engine, document)
    assert read.shape == (1, NUM_QUERIES, 2, 2)
    assert ((read.sum((2, 3)) > 0) & (read.sum((2, 3)) < 1)).all()
