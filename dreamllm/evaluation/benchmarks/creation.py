"""Pictures for texts, by Frechet distance: MS-COCO, LN-COCO, and pictures of interleaved documents (spec G.3)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dreamllm.documents import Document, PictureSource, Text
from dreamllm.evaluation.benchmarks.base import Drawing, PictureBenchmark, PictureSample, Protocol
from dreamllm.evaluation.files import (
    DataFolderError,
    entries,
    find_file,
    find_folder,
    read_json,
    read_json_lines,
    texts,
    value,
)

INCEPTION = ("pt_inception-2015-12-05-6726825d.pth", "inception.safetensors")
CLIP = ("clip-vit-large-patch14", "clip")
COCO_CAPTIONS = ("captions_val2014.json", "annotations/captions_val2014.json")
COCO_STATISTICS = "fid_stats_mscoco256_val.npz"
LN_CAPTIONS = ("lncoco_captions_val2017.jsonl", "coco_val_localized_narratives.jsonl")
"""The original's file, and that of the Localized Narratives (Pont-Tuset et al. 2020)."""
LN_STATISTICS = "fid_stats_lncoco256_val5k.npz"
DOCUMENTS = "documents.jsonl"
COCO_SAMPLES = 30_000
LIST_SEED = 42
"""Decides once which pictures and which of their captions are taken; nothing else of a run changes the list."""

MOST_WORDS = 300
"""Words of a document before a picture that are taken into the prompt, the last ones."""

_INCEPTION_FILE = " or ".join(INCEPTION)


def load_coco(folder: Path) -> list[PictureSample]:
    """One random caption of each of 30,000 random pictures; all captions of a picture are for the choice by CLIP."""
    path = find_file(folder, *COCO_CAPTIONS)
    captions: dict[int, list[str]] = {}
    for i, row in enumerate(entries(path, read_json(path), "annotations")):
        number = value(path, row, "image_id", i, "number")
        captions.setdefault(number, []).append(value(path, row, "caption", i).strip())
    rng = np.random.default_rng(LIST_SEED)
    numbers = sorted(captions)
    chosen = rng.permutation(len(numbers))[:COCO_SAMPLES]
    samples = []
    for number in (numbers[i] for i in chosen):
        group = captions[number]
        samples.append(_sample(str(number), group[int(rng.integers(len(group)))], tuple(group)))
    return samples


def load_ln_coco(folder: Path) -> list[PictureSample]:
    path = find_file(folder, *LN_CAPTIONS)
    samples = []
    for i, row in enumerate(entries(path, read_json_lines(path))):
        caption = value(path, row, "caption", i).strip()
        samples.append(_sample(f"{value(path, row, 'image_id', i, 'id')}-{i}", caption, (caption,)))
    return samples


def load_documents(folder: Path) -> list[PictureSample]:
    """The first picture of each document that has text before it; documents without one are passed over."""
    return [sample for sample, _ in _illustrated(folder)]


def real_pictures(folder: Path) -> list[PictureSource]:
    """The pictures that the documents of `load_documents` really have at those places."""
    return [picture for _, picture in _illustrated(folder)]


def _illustrated(folder: Path) -> list[tuple[PictureSample, PictureSource]]:
    path, images = find_file(folder, DOCUMENTS), find_folder(folder, "images")
    found: list[tuple[PictureSample, PictureSource]] = []
    for i, row in enumerate(entries(path, read_json_lines(path))):
        before = texts(path, row, "text_list", i)
        shown = entries(path, row, "image_info")
        placed = [(value(path, info, "matched_text_index", i, "number"), info) for info in shown]
        for index, info in sorted(placed, key=lambda pair: pair[0]):
            words = " ".join(before[: index + 1]).split()
            if words:
                text = " ".join(words[-MOST_WORDS:])
                picture = images / value(path, info, "image_name", i)
                found.append((_sample(f"{i}", text, (text,)), picture))
                break
    if not found:
        raise DataFolderError(f"{path}: no document has a picture with text before it")
    return found


def _sample(name: str, text: str, captions: tuple[str, ...]) -> PictureSample:
    return PictureSample(name, Document((Text(text, learn=False),), "error", f"caption {name}"), captions)


def _drawing(candidates: int) -> Mapping[Protocol, Drawing]:
    """Original: 150 DDPM steps and guidance 2.0, nothing else, whatever the model's configuration recommends. Plain:
    one picture as it recommends."""
    original = Drawing(150, 2.0, "ddpm", candidates, guidance_rescale=0.0, eta=0.0, negative_prompt="")
    return {"original": original, "plain": Drawing()}


BENCHMARKS = (
    PictureBenchmark(
        "coco-fid",
        "MS-COCO creation",
        "FID",
        "30,000 captions of val2014, the best of 8 by CLIP",
        (" or ".join(COCO_CAPTIONS), COCO_STATISTICS, _INCEPTION_FILE, " or ".join(f"{name}/" for name in CLIP)),
        "8.46",
        load=load_coco,
        drawing=_drawing(8),
        statistics=COCO_STATISTICS,
    ),
    PictureBenchmark(
        "ln-coco-fid",
        "LN-COCO creation",
        "FID",
        "narratives of val2017, one picture each",
        (" or ".join(LN_CAPTIONS), LN_STATISTICS, _INCEPTION_FILE),
        "20.53",
        load=load_ln_coco,
        drawing=_drawing(1),
        statistics=LN_STATISTICS,
    ),
    PictureBenchmark(
        "interleaved-fid",
        "Interleaved creation",
        "FID",
        "your held-out documents, one picture each",
        (DOCUMENTS, "images/", _INCEPTION_FILE),
        "36.62",
        load=load_documents,
        drawing=_drawing(1),
        real=real_pictures,
    ),
)
