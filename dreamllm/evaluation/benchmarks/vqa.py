"""Questions with short answers: VQAv2, OKVQA, VizWiz, TextVQA by VQA accuracy; DocVQA, InfographicVQA by ANLS (G.1)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dreamllm.evaluation.benchmarks.base import (
    AnswerBenchmark,
    Decoding,
    Figure,
    Probe,
    Prompting,
    Protocol,
    Record,
    Sample,
    Scores,
)
from dreamllm.evaluation.files import DataFolderError, entries, find_file, find_folder, read_json, texts, value
from dreamllm.evaluation.metrics import anls, vqa_accuracy
from dreamllm.training import write_text

LOOK = "Based on the image, please answer the question."
ACCURATE = "Please provide an accurate answer within one word."
SHORT_PLAIN = Prompting(
    request="\nAnswer the question using a single word or phrase.", decoding=Decoding(max_new_tokens=32), template=None
)
"""The one-line instruction of LLaVA-1.5 (Liu et al. 2023), greedy, the model's own template."""

NO_ANSWERS = "the answers are on the server; the submission file is written"


def score_vqa(records: Sequence[Record]) -> Scores:
    """Mean VQA accuracy; not run where the split has no answers."""
    return _mean(records, "VQA accuracy", vqa_accuracy)


def score_anls(records: Sequence[Record]) -> Scores:
    """Mean ANLS; not run where the split has no answers."""
    return _mean(records, "ANLS", anls)


def _mean(records: Sequence[Record], name: str, metric: Callable[[str, Sequence[str]], float]) -> Scores:
    if not any(record["references"] for record in records):
        return Scores((Figure(None, name, NO_ANSWERS),), (None,) * len(records))
    each = tuple(metric(record["prediction"], record["references"]) for record in records)
    return Scores((Figure(sum(each) / len(each), name),), each)


def write_question_ids(path: Path, records: Sequence[Record]) -> None:
    """The form of the VQA servers: a list of question_id and answer."""
    rows = [{"question_id": _number(record["id"]), "answer": record["prediction"]} for record in records]
    write_text(path, json.dumps(rows, ensure_ascii=False))


def write_images(path: Path, records: Sequence[Record]) -> None:
    """The form of the VizWiz server: a list of image and answer."""
    rows = [{"image": record["id"], "answer": record["prediction"]} for record in records]
    write_text(path, json.dumps(rows, ensure_ascii=False))


def write_document_answers(path: Path, records: Sequence[Record]) -> None:
    """The form of the document server: a list of questionId and answer."""
    rows = [{"questionId": _number(record["id"]), "answer": record["prediction"]} for record in records]
    write_text(path, json.dumps(rows, ensure_ascii=False))


def _number(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def load_coco_questions(folder: Path, questions: str, pictures: str, pattern: str, answers: str = "") -> list[Sample]:
    """The form of the VQA release: questions, and annotations where the split has them."""
    path = find_file(folder, questions)
    images = find_folder(folder, pictures)
    known: dict[int, tuple[str, ...]] = {}
    if answers:
        source = find_file(folder, answers)
        for i, row in enumerate(entries(source, read_json(source), "annotations")):
            known[value(source, row, "question_id", i, "id")] = texts(source, row, "answers", i, "answer")
    samples = []
    for i, row in enumerate(entries(path, read_json(path), "questions")):
        number = value(path, row, "question_id", i, "id")
        if answers and number not in known:
            raise DataFolderError(f"{folder / answers} has no answers to question {number} of {path}")
        picture = images / pattern.format(value(path, row, "image_id", i, "number"))
        samples.append(Sample(str(number), picture, value(path, row, "question", i), known.get(number, ())))
    return samples


def load_vizwiz(folder: Path, split: str) -> list[Sample]:
    path = find_file(folder, f"{split}.json", f"Annotations/{split}.json")
    images = find_folder(folder, split)
    samples = []
    for i, row in enumerate(entries(path, read_json(path))):
        name = value(path, row, "image", i)
        answers = texts(path, row, "answers", i, "answer") if split != "test" else ()
        samples.append(Sample(name, images / name, value(path, row, "question", i), answers))
    return samples


def load_textvqa(folder: Path) -> list[Sample]:
    path = find_file(folder, "TextVQA_0.5.1_val.json")
    images = find_folder(folder, "train_images")
    return [
        Sample(
            str(value(path, row, "question_id", i, "id")),
            images / f"{value(path, row, 'image_id', i)}.jpg",
            value(path, row, "question", i),
            texts(path, row, "answers", i),
        )
        for i, row in enumerate(entries(path, read_json(path), "data"))
    ]


def load_documents(folder: Path, files: Sequence[str], picture_key: str, pictures: Sequence[str]) -> list[Sample]:
    """DocVQA and InfographicVQA."""
    path = find_file(folder, *files)
    images = find_folder(folder, *pictures)
    samples = []
    for i, row in enumerate(entries(path, read_json(path), "data")):
        name = Path(value(path, row, picture_key, i)).name
        answers = texts(path, row, "answers", i)
        number = str(value(path, row, "questionId", i, "id"))
        samples.append(Sample(number, images / name, value(path, row, "question", i), answers))
    return samples


def _short(start: str, request: str = ACCURATE, system: str = LOOK, **more: Any) -> Prompting:
    return Prompting(system=system, request=request, start=start, clean="short", **more)


_ONE_WORD = _short("The short answer (one word) is:")
_UNKNOWABLE = Probe("contains", "unanswerable")
_VIZWIZ: dict[Protocol, Prompting] = {
    "original": _short("The answer is:", probe=_UNKNOWABLE),
    "plain": Prompting(
        request="\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
        "Answer the question using a single word or phrase.",
        decoding=Decoding(max_new_tokens=32),
        template=None,
    ),
}
_DOCUMENTS: dict[Protocol, Prompting] = {"original": Prompting(square=True), "plain": SHORT_PLAIN}
_DOCVQA_FILES = ("val_v1.0.json", "val_v1.0_withQT.json")
_DOCVQA_PICTURES = ("documents", "spdocvqa_images")
_INFOGRAPHIC_FILES = ("infographicsVQA_val_v1.0.json", "infographicsVQA_val_v1.0_withQT.json")
_VQAV2: dict[Protocol, Prompting] = {"original": _ONE_WORD, "plain": SHORT_PLAIN}

BENCHMARKS = (
    AnswerBenchmark(
        "vqav2",
        "VQAv2",
        "VQA accuracy",
        "test-dev, by the server",
        ("v2_OpenEnded_mscoco_test-dev2015_questions.json", "test2015/"),
        "56.6",
        load=partial(
            load_coco_questions,
            questions="v2_OpenEnded_mscoco_test-dev2015_questions.json",
            pictures="test2015",
            pattern="COCO_test2015_{:012d}.jpg",
        ),
        score=score_vqa,
        prompting=_VQAV2,
        submission=("vqav2_submission.json", write_question_ids),
    ),
    AnswerBenchmark(
        "vqav2-val",
        "VQAv2",
        "VQA accuracy",
        "validation",
        ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json", "val2014/"),
        load=partial(
            load_coco_questions,
            questions="v2_OpenEnded_mscoco_val2014_questions.json",
            answers="v2_mscoco_val2014_annotations.json",
            pictures="val2014",
            pattern="COCO_val2014_{:012d}.jpg",
        ),
        score=score_vqa,
        prompting=_VQAV2,
    ),
    AnswerBenchmark(
        "okvqa",
        "OKVQA",
        "VQA accuracy",
        "validation",
        ("OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json", "val2014/"),
        "44.3",
        load=partial(
            load_coco_questions,
            questions="OpenEnded_mscoco_val2014_questions.json",
            answers="mscoco_val2014_annotations.json",
            pictures="val2014",
            pattern="COCO_val2014_{:012d}.jpg",
        ),
        score=score_vqa,
        prompting={
            "original": _short(
                "The short answer (one word) is:",
                "Please provide an accurate and brief answer within one word.",
                system="",
            ),
            "plain": SHORT_PLAIN,
        },
    ),
    AnswerBenchmark(
        "vizwiz",
        "VizWiz",
        "VQA accuracy",
        "test-dev, by the server",
        ("test.json", "test/"),
        "45.8",
        load=partial(load_vizwiz, split="test"),
        score=score_vqa,
        prompting=_VIZWIZ,
        submission=("vizwiz_submission.json", write_images),
    ),
    AnswerBenchmark(
        "vizwiz-val",
        "VizWiz",
        "VQA accuracy",
        "validation",
        ("val.json", "val/"),
        load=partial(load_vizwiz, split="val"),
        score=score_vqa,
        prompting=_VIZWIZ,
    ),
    AnswerBenchmark(
        "textvqa",
        "TextVQA",
        "VQA accuracy",
        "validation",
        ("TextVQA_0.5.1_val.json", "train_images/"),
        "34.9",
        load=load_textvqa,
        score=score_vqa,
        prompting={"original": _short("The answer is:"), "plain": SHORT_PLAIN},
    ),
    AnswerBenchmark(
        "docvqa",
        "DocVQA",
        "ANLS",
        "validation",
        (" or ".join(_DOCVQA_FILES), " or ".join(f"{name}/" for name in _DOCVQA_PICTURES)),
        load=partial(load_documents, files=_DOCVQA_FILES, picture_key="image", pictures=_DOCVQA_PICTURES),
        score=score_anls,
        prompting=_DOCUMENTS,
        submission=("docvqa_submission.json", write_document_answers),
    ),
    AnswerBenchmark(
        "infographicvqa",
        "InfographicVQA",
        "ANLS",
        "validation",
        (" or ".join(_INFOGRAPHIC_FILES), "images/ or infographicsvqa_images/"),
        load=partial(
            load_documents,
            files=_INFOGRAPHIC_FILES,
            picture_key="image_local_name",
            pictures=("images", "infographicsvqa_images"),
        ),
        score=score_anls,
        prompting=_DOCUMENTS,
        submission=("infographicvqa_submission.json", write_document_answers),
    ),
)
