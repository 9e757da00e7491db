"""`dreamllm serve`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dreamllm.inference import Engine, drawing_defaults, load
from dreamllm.server.engine_backend import EngineBackend
from dreamllm.server.keys import ApiKeys
from dreamllm.server.limits import Limits
from dreamllm.server.memory import bound_onednn_caches

if TYPE_CHECKING:
    from dreamllm.server.service import Served


def serve(
    model: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "cpu",
    dtype: str = "float32",
    int8_weights: bool = False,
    name: str | None = None,
    api_keys: Path | None = None,
    max_batch: int = 8,
    max_queue: int = 64,
    allow_urls: bool = False,
    log_prompts: bool = False,
    limits: Limits = Limits(),  # noqa: B008 - frozen
) -> None:
    """Serves a model over HTTP with OpenAI's interface.

    Chats of text and pictures (/v1/chat/completions), pictures (/v1/images/generations), /v1/models, /health and
    /metrics. SIGTERM finishes what runs and refuses what is new.

    Args:
        model: a model folder.
        host: address to listen on; 0.0.0.0 for every network of this machine.
        port: port to listen on; 0 takes a free one, which the log names.
        device: cpu, cuda, cuda:1, ...
        dtype: of the weights: float32, bfloat16 or float16.
        int8_weights: keep the language model's weights in eight bits; needs the extra `int8`.
        name: what clients call the model; default: the name of its folder.
        api_keys: a file with one key per line; everything but /health needs one. Default: nothing needs a key.
        max_batch: requests that are answered together.
        max_queue: requests that may wait beside those; one more is answered 429.
        allow_urls: fetch pictures that requests name by http(s) addresses, from public hosts only.
        log_prompts: write the texts of requests into the log.
        limits: what a request may cost.

    Raises `ImportError` without the extra `serve`, `OSError` for an address that cannot be listened on, and what
    `dreamllm.inference.load` raises.
    """
    with needing("dreamllm serve"):
        from dreamllm.server.fetching import Fetcher
        from dreamllm.server.running import listen, run
        from dreamllm.server.service import Service
    keys = None if api_keys is None else ApiKeys.read(api_keys)
    bound_onednn_caches()
    engine = load(model, device, dtype, max_batch, int8_weights=int8_weights).engine
    with listen(host, port) as listening:
        fetcher = Fetcher(limits) if allow_urls else None
        served = served_model(engine, name or Path(model).resolve().name)
        service = Service(EngineBackend(engine), served, limits, max_queue, fetcher, log_prompts)
        run(service, keys, listening)


def served_model(engine: Engine, name: str) -> Served:
    """A model as clients see it under a name."""
    from dreamllm.server.service import Served

    processor = engine.processor
    return Served(name, processor.template, drawing_defaults(engine.model), processor.settings.target_size)


@contextmanager
def needing(command: str) -> Iterator[None]:
    """Around imports of a command's extra. Raises `ImportError` that names it where a package is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] == "dreamllm":
            raise
        raise ImportError(
            f"the package {error.name} is not installed; {command} needs the extra: "
            "pip install --no-build-isolation '.[serve]'"
        ) from None
