"""`dreamllm demo`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from dreamllm.demo.examples import read_examples
from dreamllm.inference import load
from dreamllm.server import EngineBackend
from dreamllm.server.command import needing, served_model
from dreamllm.server.limits import Limits
from dreamllm.server.memory import bound_onednn_caches


def demo(
    model: Path,
    host: str = "127.0.0.1",
    port: int = 7860,
    device: str = "cpu",
    dtype: str = "float32",
    int8_weights: bool = False,
    name: str | None = None,
    max_batch: int = 8,
    max_queue: int = 32,
    limits: Limits = Limits(),  # noqa: B008 - frozen
) -> None:
    """Shows a model on a page: chat, pictures, documents, and where dream queries look.

    Several visitors share the model; their requests are answered together. The page talks to the interface of
    `dreamllm serve`, which is at the same address, within the same limits.

    Args:
        model: a model folder; its examples.json, if it has one, says what the page offers to try.
        host: address to listen on; 0.0.0.0 for every network of this machine.
        port: port to listen on; 0 takes a free one, which the log names.
        device: cpu, cuda, cuda:1, ...
        dtype: of the weights: float32, bfloat16 or float16.
        int8_weights: keep the language model's weights in eight bits; needs the extra `int8`.
        name: what the page calls the model; default: the name of its folder.
        max_batch: requests that are answered together.
        max_queue: requests that may wait beside those; visitors beyond are asked to wait.
        limits: what a request may cost.

    Raises `ImportError` without the extra `serve`, `OSError` for an address that cannot be listened on, `ValueError`
    for examples.json that holds no examples, and what `dreamllm.inference.load` raises.
    """
    with needing("dreamllm demo"):
        from dreamllm.demo.routes import add_routes
        from dreamllm.server.running import listen, run
        from dreamllm.server.service import Service
    examples = read_examples(model)
    bound_onednn_caches()
    engine = load(model, device, dtype, max_batch, int8_weights=int8_weights).engine
    with listen(host, port) as listening:
        backend = EngineBackend(engine)
        served = served_model(engine, name or Path(model).resolve().name)
        service = Service(backend, served, limits, max_queue)
        run(service, None, listening, partial(add_routes, service=service, backend=backend, examples=examples))
