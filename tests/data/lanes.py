"""Documents of many lengths, and what is compared of the batches made of them."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import torch

from dreamllm.data import (
    Batches,
    DocumentList,
    LoaderSettings,
    LoaderState,
    Mixture,
    Pairs,
    Part,
    load_steps,
    open_pairs,
)
from dreamllm.documents import Document, PackedBatch, interleaved, pair
from dreamllm.workloads import make_processor
from tests.data.pictures import png


def documents(count: int, seed: int = 0) -> list[Document]:
    """Pairs in both directions and interleaved documents."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        words = " ".join(rng.choice(("a", "fox", "snow", "in")) for _ in range(rng.randint(1, 60)))
        kind = rng.choice(("comprehension", "creation", "interleaved"))
        if kind == "interleaved":
            pictures = [(0, png(i + k)) for k in range(rng.randint(0, 3))]
            made.append(interleaved([words, "then"], pictures, name=f"{i}"))
        else:
            made.append(pair(png(i), words, kind, name=f"{i}"))
    return made


def make(processor, count: int = 40, seed: int = 0, **settings) -> Batches:
    return Batches(
        Mixture([Part(DocumentList(documents(count), "mixed"))], seed), processor, LoaderSettings(**settings)
    )


def assert_equal(a: PackedBatch, b: PackedBatch) -> None:
    """Every bit the same."""
    for name, x in vars(a).items():
        y = getattr(b, name)
        if isinstance(x, torch.Tensor):
            assert y is not None, name
            assert x.dtype == y.dtype, name
            assert torch.equal(x, y), name
        else:
            assert x == y, name


def run(batches: Batches, of: int, ranks: int, start: LoaderState, steps: int, workers: int = 0):
    """`steps` steps of all lanes as `ranks` processes load them: the batches by step and lane, and the state after."""
    share = of // ranks
    states, rows = [], [[] for _ in range(steps)]
    for rank in range(ranks):
        lanes = range(rank * share, (rank + 1) * share)
        state = start.of(lanes)
        for row, loaded in zip(rows, load_steps(batches, lanes, of, start, workers=workers, steps=steps), strict=True):
            row += loaded
            state = state.after(batch.plan for batch in loaded)
        states.append(state)
    return rows, LoaderState.merge(states)


def digest(folder: Path) -> str:
    """A hash of all that three packs of the pairs in `folder` hold."""
    reader = Pairs(open_pairs(folder), "both", seed=3)
    batches = Batches(Mixture([Part(reader)], 5), make_processor("tiny"), LoaderSettings(tokens_per_batch=256))
    hashed = hashlib.sha256()
    for (loaded,) in load_steps(batches, range(1), 1, LoaderState.initial(1), steps=3):
        hashed.update(repr((loaded.plan, loaded.batch.names)).encode())
        for tensor in (loaded.batch.input_ids, loaded.batch.pixel_values, loaded.batch.target_pixel_values):
            hashed.update(b"" if tensor is None else tensor.numpy().tobytes())
    return hashed.hexdigest()
