"""How fast documents are loaded, beside nothing but decoding and resizing the same pictures with Pillow.

    python -m benchmarks.data [--stage 2] [--size 7b] [--batches 8] [--workers 2] [--rounds 5]

Loading also crops, tokenises, packs and, with workers, hands batches over to this process. Both run on the same number
of threads: one, or one per worker, from start to end, forks included, one after the other in each round; the median
over the rounds counts. The last rows also make float32 pixel values in this process, which is a GPU's work where there
is one.
"""

from __future__ import annotations

import argparse
import io
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from dreamllm.data import Batches, LoaderSettings, LoaderState, Mixture, load_steps
from dreamllm.documents import EncodedDocument
from dreamllm.workloads import make_processor
from dreamllm.workloads.stages import parts

VISION_SIDE, TARGET_SIDE = 224, 512


@dataclass
class Measured:
    """Documents and pictures per second, and what share of Pillow's rate that is."""

    name: str
    documents: float
    pictures: float
    share: float


def bare(documents: Sequence[EncodedDocument]) -> None:
    """Decodes each picture of a document once and resizes it to what it is needed in."""
    for document in documents:
        decoded: dict[int, Image.Image] = {}
        for source in (*document.images, *document.targets):
            if id(source) not in decoded:
                assert isinstance(source, bytes)
                decoded[id(source)] = Image.open(io.BytesIO(source)).convert("RGB")
        for source in document.images:
            _resize(decoded[id(source)], VISION_SIDE, Image.Resampling.BICUBIC)
        for source in document.targets:
            _resize(decoded[id(source)], TARGET_SIDE, Image.Resampling.BILINEAR)


def _resize(image: Image.Image, side: int, resample: Image.Resampling) -> None:
    ratio = side / min(image.size)
    image.resize((round(image.width * ratio), round(image.height * ratio)), resample)


def measure(stage: str, size: str, batches: int, workers: int, rounds: int) -> list[Measured]:
    """Pillow alone, batches of a fixed number of documents, and batches of 8,192 tokens."""
    mixture, processor = Mixture(parts(stage, size), 1), make_processor(size)
    kinds = {
        "8 documents per batch": LoaderSettings(documents_per_batch=8),
        "packs of 8,192 tokens": LoaderSettings(tokens_per_batch=8192),
    }
    measured = []
    for name, settings in kinds.items():
        loading = Batches(mixture, processor, settings)
        plans = list(itertools.islice(loading.plans(0, 1), batches))
        groups = [
            [loading.samples.text(mixture.draw(position), []).encoded for position in plan.positions] for plan in plans
        ]
        documents = sum(map(len, groups))
        pictures = sum(len(document.images) + len(document.targets) for group in groups for document in group)
        runs = {
            "Pillow alone": _bare_in(groups, workers),
            "loader": _loader(loading, batches, workers),
            "loader and pixel values": _loader(loading, batches, workers, device="cpu"),
        }
        seconds = _alternate(list(runs.values()), rounds)
        for what, taken in zip(runs, seconds, strict=True):
            measured.append(Measured(f"{what}, {name}", documents / taken, pictures / taken, seconds[0] / taken))
    return measured


def _bare_in(groups: Sequence[Sequence[EncodedDocument]], workers: int) -> Callable[[], None]:
    if workers == 0:
        return lambda: bare([document for group in groups for document in group])

    def run() -> None:
        context = multiprocessing.get_context("fork")
        shares = [[document for group in groups[worker::workers] for document in group] for worker in range(workers)]
        processes = [context.Process(target=bare, args=(share,)) for share in shares]
        for process in processes:
            process.start()
        for process in processes:
            process.join()

    return run


def _loader(loading: Batches, batches: int, workers: int, device: str | None = None) -> Callable[[], None]:
    def run() -> None:
        for (loaded,) in load_steps(loading, range(1), 1, LoaderState.initial(1), workers, steps=batches):
            if device is not None:
                loaded.batch.to(device)

    return run


def _alternate(runs: Sequence[Callable[[], None]], rounds: int) -> list[float]:
    """Median seconds of each, after one round that does not count."""
    taken: list[list[float]] = [[] for _ in runs]
    for number in range(rounds + 1):
        for times, run in zip(taken, runs, strict=True):
            begin = time.perf_counter()
            run()
            if number:
                times.append(time.perf_counter() - begin)
    return [statistics.median(times) for times in taken]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stage", default="2")
    parser.add_argument("--size", default="7b")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    table = Table("what", "workers", "documents/s", "pictures/s", "share of Pillow alone")
    for workers in arguments.workers:
        for row in measure(arguments.stage, arguments.size, arguments.batches, workers, arguments.rounds):
            table.add_row(row.name, str(workers), f"{row.documents:.1f}", f"{row.pictures:.1f}", f"{row.share:.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
