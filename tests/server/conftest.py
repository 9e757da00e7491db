from __future__ import annotations

import pytest

from dreamllm.inference import DrawingOptions, Engine
from dreamllm.server import EngineBackend
from dreamllm.server.service import Served
from tests.server.support import MODEL, Scripted, hello, serving
from tests.tiny import tiny_model

QUICK = DrawingOptions(steps=2, guidance_scale=2.0, scheduler="ddim")


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    return Engine(*tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny model as `dreamllm serve` loads it."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    model, processor = tiny_model(tmp_path_factory.mktemp("tiny"))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def served(engine):
    return Served(MODEL, engine.processor.template, QUICK, engine.processor.settings.target_size)


@pytest.fixture(scope="module")
def model_server(engine, served):
    """A tiny model behind a server of this process."""
    with serving(EngineBackend(engine), served=served) as address:
        yield address


@pytest.fixture(scope="module")
def quick_server():
    """A server that answers "Hello." to everything it accepts."""
    with serving(Scripted(hello)) as address:
        yield address


@pytest.fixture
def backend():
    """For a server whose answers the test decides."""
    return Scripted()
