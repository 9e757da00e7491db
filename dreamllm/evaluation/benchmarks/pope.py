"""POPE: is an object in the picture? Random, popular and adversarial choices of absent objects (spec section G.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from dreamllm.evaluation.benchmarks.base import AnswerBenchmark, Decoding, Figure, Prompting, Record, Sample, Scores
from dreamllm.evaluation.files import DataFolderError, entries, find_file, find_folder, read_json_lines, value
from dreamllm.evaluation.metrics import read_yes_no, yes_no_scores

NAMES = {"accuracy": "accuracy", "f1": "F1", "precision": "precision", "recall": "recall", "yes_ratio": "share of yes"}
TOP_K = 50
"""The original names a temperature only; this is what `generate()` adds where nothing is said."""
PAPER = {"random": "86.36 (F1 86.91)", "popular": "", "adversarial": "72.63 (F1 76.47)"}


def score(records: Sequence[Record]) -> Scores:
    said = [read_yes_no(record["prediction"]) for record in records]
    true = [record["references"][0] for record in records]
    scores = asdict(yes_no_scores(said, true))
    figures = tuple(Figure(scores[key], name) for key, name in NAMES.items())
    return Scores(figures, tuple(float(s == t) for s, t in zip(said, true, strict=True)))


def load(folder: Path, kind: str) -> list[Sample]:
    path = find_file(folder, f"coco_pope_{kind}.json")
    images = find_folder(folder, "val2014")
    samples = []
    for i, row in enumerate(entries(path, read_json_lines(path))):
        label = value(path, row, "label", i)
        if label not in ("yes", "no"):
            raise DataFolderError(f"{path}: entry {i} has the label {label!r}; it must be 'yes' or 'no'")
        picture = images / value(path, row, "image", i)
        number = str(value(path, row, "question_id", i, "id"))
        samples.append(Sample(number, picture, value(path, row, "text", i), (label,)))
    return samples


BENCHMARKS = tuple(
    AnswerBenchmark(
        f"pope-{kind}",
        f"POPE, {kind}",
        "accuracy",
        "COCO val2014",
        (f"coco_pope_{kind}.json", "val2014/"),
        PAPER[kind],
        load=partial(load, kind=kind),
        score=score,
        prompting={
            "original": Prompting(
                system="Based on the image, please objectively and accurately indicate whether the object exists.",
                start="The answer is:",
                decoding=Decoding(temperature=0.2, top_k=TOP_K),
            ),
            "plain": Prompting(
                request="\nAnswer the question using a single word or phrase.",
                decoding=Decoding(max_new_tokens=16),
                template=None,
            ),
        },
    )
    for kind in ("random", "popular", "adversarial")
)
