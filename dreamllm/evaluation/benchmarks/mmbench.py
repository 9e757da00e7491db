"""MMBench: single-choice questions of many kinds, from the published TSV file with pictures inside (spec G.1)."""

from __future__ import annotations

import base64
import binascii
import csv
import io
from collections.abc import Sequence
from pathlib import Path

from dreamllm.evaluation.benchmarks.base import (
    AnswerBenchmark,
    Decoding,
    Figure,
    Probe,
    Prompting,
    Record,
    Sample,
    Scores,
)
from dreamllm.evaluation.files import DataFolderError, find_file
from dreamllm.evaluation.metrics import grouped_accuracy, match_numbered
from dreamllm.evaluation.metrics.choices import LETTERS, mmbench_question
from dreamllm.training import write_text

FILE = "mmbench_dev_20230712.tsv"
LONGEST_REFERENCE = 64
"""A picture field of at most this many characters is the index of the row whose picture is meant."""

GROUPS = ("category", "l2-category", "split")
"""Columns that the server groups its figures by."""

_ABSENT = {"", "nan"}


def score(records: Sequence[Record]) -> Scores:
    """Accuracy with option matching; a question that the file asks in rotations counts when all of them are right.

    The server asks a language model about answers that name no option; here they are wrong, and their share is told.
    """
    chosen = [_chosen(record) for record in records]
    if not any(record["references"] for record in records):
        reason = "the answers are on the server; the submission file is written"
        return Scores((Figure(None, "accuracy", reason),), (None,) * len(records))
    right = [c == record["references"][0] for c, record in zip(chosen, records, strict=True)]
    groups = [mmbench_question(int(record["id"])) for record in records]
    figures = [Figure(grouped_accuracy(right, groups), "accuracy")]
    if len(set(groups)) < len(groups):
        figures.append(Figure(sum(right) / len(right), "accuracy of single rotations"))
    figures.append(Figure(chosen.count(None) / len(chosen), "answers that name no option"))
    for category in sorted({record["details"].get("category") or "" for record in records} - {""}):
        part = [i for i, record in enumerate(records) if record["details"].get("category") == category]
        accuracy = grouped_accuracy([right[i] for i in part], [groups[i] for i in part])
        figures.append(Figure(accuracy, category.replace("_", " ")))
    return Scores(tuple(figures), tuple(map(float, right)))


def _chosen(record: Record) -> str | None:
    return match_numbered(record["prediction"], record["details"]["options"])


def write_submission(path: Path, records: Sequence[Record]) -> None:
    """A table as the server takes it (.tsv, .csv or .xlsx): the file's columns without pictures, and `prediction`."""
    out = io.StringIO()
    columns = ["index", "question", "hint", *LETTERS[:4], "answer", *GROUPS, "prediction"]
    writer = csv.DictWriter(out, columns, delimiter="\t", lineterminator="\n", extrasaction="ignore", restval="")
    writer.writeheader()
    for record in records:
        details = record["details"]
        options = {letter: details["options"].get(letter, "") for letter in LETTERS[:4]}
        row = {"index": record["id"], "answer": "".join(record["references"]), "prediction": record["prediction"]}
        row |= {**details, **options}
        writer.writerow({key: " ".join(str(text).split()) for key, text in row.items()})
    write_text(path, out.getvalue())


def load(folder: Path) -> list[Sample]:
    path = find_file(folder, FILE)
    try:
        rows = _rows(path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataFolderError(f"{path} is not a table of texts in UTF-8 between tabs: {error}") from error
    pictures = {row["index"]: row["image"] for row in rows}
    return [_sample(path, row, pictures) for row in rows]


def _rows(path: Path) -> list[dict[str, str]]:
    csv.field_size_limit(2**31 - 1)  # pictures stand in the fields
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        there = list(reader.fieldnames or ())
        missing = {"index", "question", "image", "A", "B"} - set(there)
        if missing:
            raise DataFolderError(
                f"{path} lacks the columns {', '.join(sorted(missing))}; it has {', '.join(there)[:200] or 'none'}"
            )
        rows = list(reader)
    for i, row in enumerate(rows):
        if None in row or None in row.values() or not row["index"].isdecimal():
            raise DataFolderError(f"{path}: row {i} is not one field for each of the columns, with a number as index")
    return rows


def _sample(path: Path, row: dict[str, str], pictures: dict[str, str]) -> Sample:
    encoded = row["image"]
    if len(encoded) <= LONGEST_REFERENCE:
        encoded = pictures.get(encoded, "")
    try:
        picture = base64.b64decode(encoded, validate=True)
    except binascii.Error:
        picture = b""
    if not picture:
        raise DataFolderError(
            f"{path}: the picture of row {row['index']} is neither base64 nor the index of another row"
        )
    options = {letter: row[letter] for letter in LETTERS if (row.get(letter) or "").strip().lower() not in _ABSENT}
    hint = row.get("hint") or ""
    hint = "" if hint.strip().lower() in _ABSENT else hint
    question = f"Hint:{hint}Question:{row['question']}" if hint else f"Question:{row['question']}"
    answer = (row.get("answer") or "").strip()
    details = {"options": options, "hint": hint, "question": row["question"]}
    details |= {name: row.get(name) or "" for name in GROUPS}
    return Sample(row["index"], picture, question, (answer,) if answer.lower() not in _ABSENT else (), details)


BENCHMARKS = (
    AnswerBenchmark(
        "mmbench",
        "MMBench",
        "accuracy",
        "dev 20230712",
        (FILE,),
        "49.9",
        load=load,
        score=score,
        prompting={
            "original": Prompting(
                system="This is an exam, please answer according to the image, hint and question.",
                request="Please provide an accurate and detailed answer.",
                probe=Probe("begins", None),
            ),
            "plain": Prompting(
                request="\nAnswer with the option's letter from the given choices directly.",
                decoding=Decoding(max_new_tokens=32),
                template=None,
                options=True,
            ),
        },
        submission=("mmbench_submission.tsv", write_submission),
    ),
)
