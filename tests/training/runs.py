"""Small runs on a tiny random model: two stages of twelve steps on captioned random pictures."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

from dreamllm.data import Pairs, Part, Reader, open_pairs
from dreamllm.documents import Document
from dreamllm.training import RunConfig, RunSettings, StageConfig, read_metrics, run
from tests.data.pictures import write_pairs
from tests.tiny import tiny_model

STEPS = 12
DOCUMENTS = 4
SETTINGS = RunSettings(num_threads=1, checkpoint_every=4, log_every=3, device="cpu")


def write_start(folder: Path) -> Path:
    """A tiny model to start from in `start/`, and twenty captioned pictures in `data/`."""
    model, processor = tiny_model(folder / "components")
    model.save_pretrained(folder / "start")
    processor.save_pretrained(folder / "start")
    write_pairs(folder / "data", 20)
    return folder


class Hooked(Reader):
    """The same documents; `hook(n)` is called before the n-th one, counted from 0, is read."""

    def __init__(self, reader: Reader, hook: Callable[[int], None]) -> None:
        self.reader, self.hook, self.count, self.name = reader, hook, 0, reader.name

    def __len__(self) -> int:
        return len(self.reader)

    def document(self, index: int, epoch: int = 0) -> Document:
        self.hook(self.count)
        self.count += 1
        return self.reader.document(index, epoch)

    def describe(self) -> dict[str, Any]:
        return self.reader.describe()


def config(root: Path, out: Path, hook: Callable[[int], None] | None = None, **settings: Any) -> RunConfig:
    """Stage I and II of `STEPS` steps of `DOCUMENTS` documents each; `hook` sees the documents of both."""
    reader: Reader = Pairs(open_pairs(root / "data"), "both", seed=3)
    data = (Part(Hooked(reader, hook) if hook else reader),)
    common = {"data": data, "steps": STEPS, "documents_per_step": DOCUMENTS, "condition_dropout": 0.2}
    stages = (
        StageConfig("one", "stage1", learning_rate=1e-2, **common),
        StageConfig("two", "stage2", learning_rate=1e-3, micro_batches=2, snr_gamma=5.0, weight_decay=0.1, **common),
    )
    return RunConfig(root / "start", stages, out, seed=11, settings=replace(SETTINGS, **settings))


def quiet_run(configuration: RunConfig) -> str:
    """Runs it and returns what it printed."""
    text = io.StringIO()
    run(configuration, Console(file=text, width=200))
    return text.getvalue()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics without what the clock and the machine decide."""
    machine = ("seconds", "data_seconds", "memory_bytes", "share_of_peak")
    return [{key: value for key, value in line.items() if key not in machine} for line in read_metrics(out)]


def assert_same_result(out: Path, reference: Path) -> None:
    """Bit-identical final weights, weights after the first stage, and metrics."""
    for folder in ("one/model", "model"):
        found, expected = weights(out / folder), weights(reference / folder)
        assert found.keys() == expected.keys()
        different = [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]
        assert not different
    assert metrics(out) == metrics(reference)
