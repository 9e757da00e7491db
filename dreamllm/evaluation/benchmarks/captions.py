"""Captioning: COCO (Karpathy test), NoCaps and Stanford image paragraphs, scored by CIDEr-D (spec section G.1)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from dreamllm.evaluation.benchmarks.base import AnswerBenchmark, Decoding, Figure, Prompting, Record, Sample, Scores
from dreamllm.evaluation.files import DataFolderError, entries, find_file, find_folder, read_json, texts, value
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
GENOME = ("VG_100K", "VG_100K_2")
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
        names = [value(path, row, "image", i) for i, row in enumerate(rows)]
        return [
            Sample(
                re.sub(r"\D", "", Path(name).stem.rpartition("_")[2]) or str(i),
                folder / name,
                references=texts(path, row, "caption", i),
            )
            for i, (name, row) in enumerate(zip(names, rows, strict=True))
        ]
    samples = []
    for i, row in enumerate(entries(path, read_json(path), "images")):
        if value(path, row, "split", i) == "test":
            picture = folder / value(path, row, "filepath", i) / value(path, row, "filename", i)
            captions = texts(path, row, "sentences", i, "raw")
            samples.append(Sample(str(value(path, row, "cocoid", i, "id")), picture, references=captions))
    return samples


def load_nocaps(folder: Path) -> list[Sample]:
    path = find_file(folder, NOCAPS)
    pictures = find_folder(folder, "images", "val")
    values = read_json(path)
    captions: dict[int, list[str]] = {}
    for i, row in enumerate(entries(path, values, "annotations")):
        captions.setdefault(value(path, row, "image_id", i, "id"), []).append(value(path, row, "caption", i))
    samples = []
    for i, row in enumerate(entries(path, values, "images")):
        number = value(path, row, "id", i, "id")
        if number not in captions:
            raise DataFolderError(f"{path}: picture {number} has no caption among the annotations")
        picture = pictures / value(path, row, "file_name", i)
        details = {"domain": value(path, row, "domain", i)}
        samples.append(Sample(str(number), picture, references=tuple(captions[number]), details=details))
    return samples


def load_paragraphs(folder: Path) -> list[Sample]:
    """Visual Genome's pictures lie in one folder `images`, or in the two it is published in, told by their addresses.

    Some pictures have two paragraphs: two references of one sample.
    """
    path, ids = find_file(folder, PARAGRAPHS), find_file(folder, TEST_IDS)
    pictures = find_folder(folder, "images", *GENOME)
    wanted = read_json(ids)
    if not isinstance(wanted, list) or not all(isinstance(number, int) for number in wanted):
        raise DataFolderError(f"{ids} must be a list of the numbers of pictures")
    places: dict[int, Path] = {}
    paragraphs: dict[int, list[str]] = {number: [] for number in wanted}
    for i, row in enumerate(entries(path, read_json(path))):
        number = value(path, row, "image_id", i, "number")
        if number in paragraphs:
            part = pictures if pictures.name == "images" else folder / Path(value(path, row, "url", i)).parent.name
            places[number] = part / f"{number}.jpg"
            paragraphs[number].append(" ".join(value(path, row, "paragraph", i).split()))
    missing = [number for number, found in paragraphs.items() if not found]
    if missing:
        raise DataFolderError(
            f"{path} has no paragraph of {len(missing)} of the {len(paragraphs)} pictures in {ids.name}, "
            f"the first: {missing[0]}"
        )
    return [Sample(str(number), places[number], references=tuple(found)) for number, found in paragraphs.items()]


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
        (PARAGRAPHS, TEST_IDS, "images/, or VG_100K/ and VG_100K_2/"),
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
