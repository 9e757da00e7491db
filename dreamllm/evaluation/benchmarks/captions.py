"""Captioning: COCO (Karpathy test), NoCaps and Stanford image paragraphs, scored by CIDEr-D (spec section G.1)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from dreamllm.evaluation.benchmarks.base import AnswerBenchmark, Decoding, Figure, Prompting, Record, Sample, Scores
from dreamllm.evaluation.files import DataFolderError, entries, find_file, find_folder, read_json, value
from dreamllm.evaluation.metrics import (
    CaptionScores,
    MetricUnavailableError,
    bleu,
    cider_d,
    meteor,
    rouge_l,
    spice,
    tokenised,
)

KARPATHY, LAVIS = "dataset_coco.json", "coco_karpathy_test.json"
NOCAPS = "nocaps_val_4500_captions.json"
PARAGRAPHS, TEST_IDS = "paragraphs_v1.json", "test_split.json"
CaptionMetric = Callable[[Sequence[str], Sequence[Sequence[str]]], CaptionScores]
# The pair form, greedy: what the model was trained on, nothing added.
_PLAIN = Prompting(decoding=Decoding(max_new_tokens=40), template=None, form="pair")


def score_captions(records: Sequence[Record]) -> Scores:
    """CIDEr-D, BLEU-4 to 1, ROUGE-L on our PTB tokens, METEOR and SPICE where their programs are installed.

    A sample's own score is its CIDEr-D, 10 counting as 1.
    """
    candidates, references = _tokens(records)
    cider = cider_d(candidates, references)
    blues = bleu(candidates, references)
    figures = [Figure(cider.corpus, "CIDEr")]
    figures += [Figure(blues[n].corpus, f"BLEU-{n + 1}") for n in (3, 2, 1, 0)]
    figures.append(Figure(rouge_l(candidates, references).corpus, "ROUGE-L"))
    figures += [_where_installed("METEOR", meteor, records), _where_installed("SPICE", spice, records)]
    return Scores(tuple(figures), tuple(min(score / 10, 1.0) for score in cider.each))


def _where_installed(name: str, metric: CaptionMetric, records: Sequence[Record]) -> Figure:
    try:
        return Figure(metric(*_tokens(records)).corpus, name)
    except MetricUnavailableError as error:
        return Figure(None, name, str(error))


def score_nocaps(records: Sequence[Record]) -> Scores:
    """As `score_captions`, and CIDEr-D of the three domains, each with its own document frequencies."""
    scores = score_captions(records)
    domains = []
    for domain in ("in-domain", "near-domain", "out-domain"):
        part = [record for record in records if record["details"].get("domain") == domain]
        if part:
            domains.append(Figure(cider_d(*_tokens(part)).corpus, f"CIDEr, {domain}"))
    return Scores((scores.figures[0], *domains, *scores.figures[1:]), scores.each)


def _tokens(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    return tokenised([record["prediction"] for record in records]), [tokenised(r["references"]) for r in records]


def load_coco(folder: Path) -> list[Sample]:
    """Karpathy's own file, or the test list in the form of LAVIS."""
    path = find_file(folder, KARPATHY, LAVIS)
    if path.name == LAVIS:
        rows = entries(path, read_json(path))
        return [
            Sample(
                re.sub(r"\D", "", Path(value(path, row, "image", i)).stem.rpartition("_")[2]) or str(i),
                folder / value(path, row, "image", i),
                references=tuple(value(path, row, "caption", i)),
            )
            for i, row in enumerate(rows)
        ]
    samples = []
    for i, row in enumerate(entries(path, read_json(path), "images")):
        if value(path, row, "split", i) == "test":
            picture = folder / row.get("filepath", "val2014") / value(path, row, "filename", i)
            captions = tuple(sentence["raw"] for sentence in value(path, row, "sentences", i))
            samples.append(Sample(str(row.get("cocoid", i)), picture, references=captions))
    return samples


def load_nocaps(folder: Path) -> list[Sample]:
    path = find_file(folder, NOCAPS)
    pictures = find_folder(folder, "images", "val")
    values = read_json(path)
    captions: dict[int, list[str]] = {}
    for i, row in enumerate(entries(path, values, "annotations")):
        captions.setdefault(value(path, row, "image_id", i), []).append(value(path, row, "caption", i))
    samples = []
    for i, row in enumerate(entries(path, values, "images")):
        number = value(path, row, "id", i)
        if number not in captions:
            raise DataFolderError(f"{path}: picture {number} has no caption among the annotations")
        picture = pictures / value(path, row, "file_name", i)
        details = {"domain": row.get("domain", "")}
        samples.append(Sample(str(number), picture, references=tuple(captions[number]), details=details))
    return samples


def load_paragraphs(folder: Path) -> list[Sample]:
    path, ids = find_file(folder, PARAGRAPHS), find_file(folder, TEST_IDS)
    pictures = find_folder(folder, "images", "VG_100K")
    wanted = set(read_json(ids))
    samples = []
    for i, row in enumerate(entries(path, read_json(path))):
        number = value(path, row, "image_id", i)
        if number in wanted:
            paragraph = " ".join(value(path, row, "paragraph", i).split())
            samples.append(Sample(str(number), pictures / f"{number}.jpg", references=(paragraph,)))
    return samples


BENCHMARKS = (
    AnswerBenchmark(
        "coco-caption",
        "COCO captions",
        "CIDEr",
        "Karpathy test",
        (f"{KARPATHY} or {LAVIS}", "val2014/"),
        "115.4",
        load=load_coco,
        score=score_captions,
        prompting={
            "original": Prompting(
                system="Based on the image, give the image caption briefly.",
                request="Please summarize object in one sentence within 10 words.",
                start="The image depicts",
                clean="capital",
            ),
            "plain": _PLAIN,
        },
    ),
    AnswerBenchmark(
        "nocaps",
        "NoCaps",
        "CIDEr",
        "validation",
        (NOCAPS, "images/ or val/"),
        load=load_nocaps,
        score=score_nocaps,
        prompting={
            "original": Prompting(
                request="Please summarize object briefly in one sentence within 5 words.", clean="capital"
            ),
            "plain": _PLAIN,
        },
    ),
    AnswerBenchmark(
        "image2paragraph",
        "Image2Paragraph",
        "CIDEr",
        "test",
        (PARAGRAPHS, TEST_IDS, "images/ or VG_100K/"),
        "17.4",
        load=load_paragraphs,
        score=score_captions,
        prompting={
            "original": Prompting(
                system="Based on the image, please describe the image in detail.",
                request="Please describe the image in detail.",
                start="The image depicts",
                clean="capital",
            ),
            "plain": Prompting(
                request="Describe the image in detail.", decoding=Decoding(max_new_tokens=256), template=None
            ),
        },
    ),
)
