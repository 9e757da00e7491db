"""MM-Vet: open questions whose answers a language model grades (spec section G.1)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from dreamllm.evaluation.benchmarks.base import AnswerBenchmark, Decoding, Figure, Prompting, Record, Sample, Scores
from dreamllm.evaluation.files import DataFolderError, find_file, find_folder, read_json, texts, value
from dreamllm.training import write_text

FILE = "mm-vet.json"
Judge = Callable[[str, Sequence[str], str], float]
"""Question, accepted answers, prediction -> a grade in [0, 1]."""


def score(records: Sequence[Record]) -> Scores:
    """Without a judge there is no score: grades are a language model's."""
    reason = "a language model grades the answers; give --judge, or send the submission file to the server"
    return Scores((Figure(None, "score", reason),), (None,) * len(records))


def score_with(judge: Judge, records: Sequence[Record]) -> Scores:
    """The mean grade, and that of each capability. Raises `ValueError` for a grade outside [0, 1]."""
    grades = [float(judge(record["question"], record["references"], record["prediction"])) for record in records]
    outside = next((grade for grade in grades if not 0 <= grade <= 1), None)
    if outside is not None:
        raise ValueError(f"the judge graded {outside}; a grade lies in [0, 1]")
    figures = [Figure(sum(grades) / len(grades), "score")]
    for capability in sorted({c for record in records for c in record["details"]["capability"]}):
        part = [g for g, record in zip(grades, records, strict=True) if capability in record["details"]["capability"]]
        figures.append(Figure(sum(part) / len(part), capability))
    return Scores(tuple(figures), tuple(grades))


def load_judge(name: str) -> Judge:
    """`module:function`, importable from here. Raises `ValueError` for anything else."""
    module, colon, function = name.partition(":")
    try:
        found = getattr(import_module(module), function) if colon else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the judge {name} cannot be had: {error}") from error
    if not callable(found):
        raise ValueError(f"a judge is named MODULE:FUNCTION, not {name!r}")
    return found


def write_submission(path: Path, records: Sequence[Record]) -> None:
    """The form of the server: an object from question id to answer."""
    rows = {record["id"]: record["prediction"] for record in records}
    write_text(path, json.dumps(rows, ensure_ascii=False, indent=2))


def load(folder: Path) -> list[Sample]:
    path = find_file(folder, FILE)
    images = find_folder(folder, "images")
    values = read_json(path)
    if not isinstance(values, dict) or not all(isinstance(row, dict) for row in values.values()):
        raise DataFolderError(f"{path} must be an object from question id to question")
    samples = []
    for i, (name, row) in enumerate(values.items()):
        picture = images / value(path, row, "imagename", i)
        answers = tuple(value(path, row, "answer", i).split("<AND>"))
        details = {"capability": list(texts(path, row, "capability", i))}
        samples.append(Sample(name, picture, value(path, row, "question", i), answers, details))
    return samples


BENCHMARKS = (
    AnswerBenchmark(
        "mm-vet",
        "MM-Vet",
        "score by a judge",
        "all",
        (FILE, "images/"),
        "35.9",
        load=load,
        score=score,
        prompting={
            "original": Prompting(
                system="This is an exam, please answer according to the image and question.",
                request="Please provide an accurate, detailed and comprehensive answer.",
            ),
            "plain": Prompting(decoding=Decoding(max_new_tokens=512), template=None),
        },
        submission=("mm-vet_submission.json", write_submission),
    ),
)
