"""What the processes of a loading test do."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dreamllm.model import DreamLLM
from dreamllm.training import RunSettings, StageConfig, processes
from dreamllm.training.loading import empty_model
from dreamllm.training.sharding import ShardedModel
from dreamllm.training.step import prepare_model


def spread(folder: Path, kind: str, these: Any, plainly: bool = False, **settings: Any) -> ShardedModel:
    """The model of `folder` as a stage of `kind` holds it; `plainly`: every process loads all of it first."""
    stage = StageConfig(kind, kind, (), 10, learning_rate=1e-2, documents_per_step=2)
    own = RunSettings(device="cpu", **settings)
    dtype = torch.bfloat16 if own.precision == "pure_bfloat16" else torch.float32
    model: Any = DreamLLM.from_pretrained(folder, dtype=dtype) if plainly else empty_model(folder, dtype)
    prepare_model(model, stage)
    return ShardedModel(model, stage, own, these, None if plainly else folder)


def values(through: ShardedModel) -> dict[str, tuple[str, Any, torch.Tensor]]:
    """Of every parameter and buffer: how it is spread, its part in this process, and its contents."""
    found = {}
    for name, tensor in [*through.model.named_parameters(), *through.model.named_buffers()]:
        own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        found[name] = (f"{type(tensor).__name__} {tensor.dtype} {getattr(tensor, 'placements', '')}", own.clone(), own)
    with through.whole():
        whole = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in through.model.named_parameters()}
        whole |= dict(through.model.named_buffers())
        return {name: (how, own, whole[name].detach().clone()) for name, (how, own, _) in found.items()}


def compare(folder: Path, cases: list[tuple[str, dict[str, Any]]]) -> None:
    """Every case is loaded both ways: the same parts of the same tensors, which are those of the folder."""
    reference = DreamLLM.from_pretrained(folder, dtype=torch.float32)
    stored = {**dict(reference.named_parameters()), **dict(reference.named_buffers())}
    with processes("cpu", grouped=True) as these:
        for kind, settings in cases:
            through = spread(folder, kind, these, **settings)
            found, expected = values(through), values(spread(folder, kind, these, plainly=True, **settings))
            assert found.keys() == expected.keys() == stored.keys(), (kind, settings)
            for name, (how, own, whole) in found.items():
                assert how == expected[name][0], (name, how, expected[name][0])
                assert torch.equal(own, expected[name][1]), (kind, settings, name)
                assert torch.equal(whole, stored[name].to(whole.dtype)), (kind, settings, name)
            model = through.model
            tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
            assert tied == model.config.tie_word_embeddings


def memory(folder: Path, out: Path, settings: dict[str, Any], plainly: bool) -> None:
    """Writes the most bytes that loading added to this process."""
    with processes("cpu", grouped=True) as these:
        these.wait()
        with peak() as most:
            through = spread(folder, "stage2", these, plainly, **settings)
        (out / f"{these.rank}").write_text(str(most[0]))
        del through


@contextlib.contextmanager
def peak() -> Iterator[list[int]]:
    """The most memory of its own (without mapped files) that this process had inside, beyond that before, in bytes."""
    most, before, done = [0], private_bytes(), threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            most[0] = max(most[0], private_bytes() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()
        most[0] = max(most[0], private_bytes() - before)


def private_bytes() -> int:
    """Anonymous resident memory of this process."""
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))
