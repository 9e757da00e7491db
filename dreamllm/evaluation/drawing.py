"""One shard of a benchmark of creation: candidates, the choice among them, and the distance from real pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dreamllm.documents import PictureSource, load_picture
from dreamllm.evaluation.answerer import Answerer
from dreamllm.evaluation.answering import SEED, ahead
from dreamllm.evaluation.benchmarks.base import Drawing, Figure, PictureBenchmark, PictureSample, Record
from dreamllm.evaluation.benchmarks.creation import CLIP, INCEPTION
from dreamllm.evaluation.files import find_file, find_folder
from dreamllm.evaluation.metrics import (
    FeatureStatistics,
    clip_score,
    feature_statistics,
    frechet_distance,
    inception_pixels,
    kernel_distance,
    load_inception,
)
from dreamllm.evaluation.metrics.frechet import KID_SUBSET_SIZE
from dreamllm.evaluation.records import AnswerFile, Shard
from dreamllm.inference import ClipJudge, best_candidate

PICTURES = "pictures"
FEATURE_BATCH = 32


@dataclass(frozen=True)
class Networks:
    """What creation is judged with. `clip` is None where there is no choice to make."""

    inception: Callable[[Tensor], Tensor]
    clip: ClipJudge | None
    reference: FeatureStatistics | None


def load_networks(benchmark: PictureBenchmark, drawing: Drawing, data: Path, device: str) -> Networks:
    """Raises as the loaders, before anything is drawn."""
    inception = load_inception(find_file(data, *INCEPTION)).to(device)
    clip = ClipJudge(find_folder(data, *CLIP), device) if drawing.candidates > 1 else None
    reference = FeatureStatistics.load(find_file(data, benchmark.statistics)) if benchmark.statistics else None
    return Networks(lambda pixels: inception(pixels.to(device)).cpu(), clip, reference)


def picture_file(folder: Path, index: int) -> Path:
    return folder / PICTURES / f"{index:06d}.png"


def draw_shard(
    samples: Sequence[PictureSample],
    drawing: Drawing,
    answerer: Answerer,
    clip: ClipJudge | None,
    folder: Path,
    shard: Shard,
    batch_size: int,
    done: Callable[[int], None] = lambda count: None,
    first_seed: int = SEED,
) -> None:
    """Draws what is not drawn yet; sample i has the seed `first_seed` + i.

    The candidates of a batch are judged and saved while the next batch is drawn.
    """
    indices = shard.samples(len(samples))
    file = AnswerFile(shard.file(folder), indices)
    count = file.resume(batch_size)
    done(count)
    (folder / PICTURES).mkdir(exist_ok=True)
    rest = indices[count:]
    waiting: Future[None] | None = None
    with ThreadPoolExecutor(max_workers=1) as thread:
        for start in range(0, len(rest), batch_size):
            batch = rest[start : start + batch_size]
            seeds = [first_seed + i for i in batch]
            drawn = answerer.pictures([samples[i].prompt for i in batch], drawing, seeds)
            if waiting is not None:
                waiting.result()
            waiting = thread.submit(_keep, file, folder, [samples[i] for i in batch], batch, drawn, seeds, clip)
            count += len(batch)
            done(count)
        if waiting is not None:
            waiting.result()


def _keep(
    file: AnswerFile,
    folder: Path,
    samples: Sequence[PictureSample],
    indices: Sequence[int],
    drawn: Sequence[Sequence[Image.Image]],
    seeds: Sequence[int],
    clip: ClipJudge | None,
) -> None:
    records = []
    for index, sample, candidates, seed in zip(indices, samples, drawn, seeds, strict=True):
        record: dict[str, Any] = {"index": index, "id": sample.id, "caption": sample.prompt.text(), "seed": seed}
        best = 0
        if clip is not None:
            agreement = clip.agreement(candidates, sample.captions)
            best = best_candidate(agreement)
            best_of_each = [round(float(value), 6) for value in agreement.amax(1)]
            record |= {"candidate": best, "agreement": best_of_each}
        candidates[best].save(picture_file(folder, index))
        records.append(record)
    file.append(records)


def score_pictures(
    benchmark: PictureBenchmark, networks: Networks, data: Path, folder: Path, records: Sequence[Record]
) -> tuple[Figure, ...]:
    """FID; KID where the real pictures are there; the mean CLIPScore of the chosen pictures where CLIP chose.

    Saves the statistics beside the records. KID is times 1000, as usual.
    """
    drawn = picture_features(benchmark, networks, [picture_file(folder, record["index"]) for record in records])
    statistics = feature_statistics(drawn)
    statistics.save(folder / "statistics.npz")
    if networks.reference is not None:
        figures = [Figure(frechet_distance(statistics, networks.reference), "FID", percent=False)]
    else:
        assert benchmark.real is not None
        real = picture_features(benchmark, networks, benchmark.real(data)[: len(records)])
        kid = kernel_distance(drawn, real, subset_size=min(KID_SUBSET_SIZE, len(records)))
        figures = [
            Figure(frechet_distance(statistics, feature_statistics(real)), "FID", percent=False),
            Figure(1000 * kid.mean, f"KID x 1000, subsets of {kid.subset_size}", percent=False),
        ]
    if all("agreement" in record for record in records):
        scores = [clip_score(record["agreement"][record["candidate"]]) for record in records]
        figures.append(Figure(sum(scores) / len(scores), "CLIPScore"))
    return tuple(figures)


def picture_features(benchmark: PictureBenchmark, networks: Networks, pictures: Sequence[PictureSource]) -> Tensor:
    """Features [N, D] of pictures, which are decoded in the background."""
    batches = [pictures[i : i + FEATURE_BATCH] for i in range(0, len(pictures), FEATURE_BATCH)]
    with torch.inference_mode():
        decoded = ahead(lambda batch: _pixels(benchmark, batch), batches)
        return torch.cat([networks.inception(pixels) for pixels in decoded])


def _pixels(benchmark: PictureBenchmark, pictures: Iterable[PictureSource]) -> Tensor:
    cropped = [cropped_square(load_picture(picture), benchmark.side) for picture in pictures]
    return inception_pixels(cropped, benchmark.resize)


def cropped_square(picture: Image.Image, side: int) -> Image.Image:
    """The short side resized to `side` pixels (bilinear), the centre cropped."""
    ratio = side / min(picture.size)
    width, height = (max(side, round(length * ratio)) for length in picture.size)
    if (width, height) != picture.size:
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - side) // 2, (height - side) // 2
    return picture.crop((left, top, left + side, top + side))
