"""`dreamllm evaluate digits`: the small model through the same code as the large one's benchmarks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from dreamllm.documents import Document, Text
from dreamllm.evaluation.answerer import ModelAnswerer
from dreamllm.evaluation.answering import answer_shard
from dreamllm.evaluation.benchmarks import Decoding, Drawing, Figure, PictureSample, Prompting, Sample
from dreamllm.evaluation.benchmarks.catalogue import DIGITS
from dreamllm.evaluation.digits import (
    EVALUATION,
    TARGETS,
    WORDS,
    Bar,
    DigitsOptions,
    caption_of,
    check_data,
    continue_counting,
    names_only,
    score_counting,
)
from dreamllm.evaluation.digits_judge import DigitsJudge
from dreamllm.evaluation.digits_scans import Scans, load_scans
from dreamllm.evaluation.drawing import draw_shard, picture_file
from dreamllm.evaluation.metrics import feature_statistics, frechet_distance
from dreamllm.evaluation.page import Example
from dreamllm.evaluation.progress import progress_bar
from dreamllm.evaluation.records import RECORDS_FILE, Shard, complete_lines, write_records
from dreamllm.evaluation.run import Results, RunOptions, claim, report
from dreamllm.evaluation.samples import to_uint8
from dreamllm.evaluation.statistics import Proportion
from dreamllm.inference import Assistant, DrawingOptions, drawing_defaults, load
from dreamllm.training import write_text

READING, CREATION, COUNTING_FILE = "reading", "creation", "counting.json"
PROTOCOL = "recipe"
NAMES = {
    "captions": "unseen scans named rightly",
    "creation": "drawn digits read as what was asked",
    "counting": "documents continued rightly",
    "counting_word": "documents: the right word",
    "counting_dreamed": "documents: a picture by its own decision",
    "counting_drawn": "documents: the right digit in it",
    "judge": "the judge on unseen scans",
}


def run_digits(options: RunOptions, settings: DigitsOptions = EVALUATION, console: Console | None = None) -> Results:
    """Captions of unseen scans, drawn digits before a judge, documents continued: the recipe's own figures.

    Besides, the Frechet distance of the drawn digits from the unseen scans in the judge's features. Captions and
    drawings go on where a run was ended. Raises `ValueError` for a model of other pictures.
    """
    console = console or Console(stderr=True)
    train, unseen = load_scans()
    judge = DigitsJudge(train.pictures, train.labels)
    captions = _reading_samples(unseen)
    wanted = np.repeat(np.arange(10), settings.created_per_digit)
    asked = _drawing_samples(wanted, settings)
    claim(DIGITS, options, len(captions) + len(asked), 1, console, PROTOCOL)
    assistant = load(options.model, options.device, options.dtype, options.batch_size)
    check_data(assistant, unseen.pictures, unseen.labels)
    _read(captions, assistant, options, settings, console)
    _draw(asked, assistant, options, settings, console)
    parts = _count(assistant, unseen, judge, options, settings, console)
    read = complete_lines(Shard().file(options.out / READING))
    created = to_uint8([Image.open(picture_file(options.out / CREATION, i)) for i in range(len(asked))])
    judged = judge(created)
    right = np.array([names_only(r["answer"], label) for r, label in zip(read, unseen.labels.tolist(), strict=True)])
    proportions = {
        "captions": _proportion(right),
        "creation": _proportion(judged == wanted),
        "counting": _proportion(np.all(list(parts.values()), axis=0)),
        **{f"counting_{name}": _proportion(values) for name, values in parts.items()},
        "judge": _proportion(judge(unseen.pictures) == unseen.labels),
    }
    figures = [Figure(value.share, NAMES[name]) for name, value in proportions.items()]
    distance = frechet_distance(*(feature_statistics(_features(judge, p)) for p in (created, unseen.pictures)))
    figures.append(Figure(distance, "Frechet distance in the judge's features", percent=False))
    records = _records(read, right, asked, wanted, judged)
    write_records(options.out / RECORDS_FILE, records)
    named = [
        Example(sample.picture, "", record["answer"], sample.references, record["score"])
        for sample, record in zip(captions, records, strict=False)
    ]
    drawn = [
        Example(image, f"drawn for: {sample.prompt.text()}", f"read as {WORDS[j]}", (WORDS[w],), float(j == w))
        for image, sample, j, w in zip(created, asked, judged.tolist(), wanted.tolist(), strict=True)
    ]
    # In turn, so that failures of both kinds stand among the first.
    examples = [example for pair in zip_longest(named, drawn) for example in pair if example is not None]
    how = {
        "proportions": {name: value.to_json() for name, value in proportions.items()},
        "targets": TARGETS,
        "options": {**asdict(settings), "drawing": asdict(_drawing(assistant, settings))},
    }
    return report(DIGITS, options, figures, examples, how, PROTOCOL)


def _reading_samples(scans: Scans) -> list[Sample]:
    pairs = zip(scans.pictures, scans.labels.tolist(), strict=True)
    return [Sample(str(i), picture, references=(WORDS[label],)) for i, (picture, label) in enumerate(pairs)]


def _drawing_samples(wanted: np.ndarray, settings: DigitsOptions) -> list[PictureSample]:
    samples = []
    for i, number in enumerate(wanted.tolist()):
        text = caption_of(settings.captions[i % len(settings.captions)], number)
        samples.append(PictureSample(str(i), Document((Text(text),), "error", "caption"), (text,)))
    return samples


def _read(
    samples: Sequence[Sample], assistant: Assistant, options: RunOptions, settings: DigitsOptions, console: Console
) -> None:
    folder = options.out / READING
    folder.mkdir(exist_ok=True)
    prompting = Prompting(decoding=Decoding(max_new_tokens=settings.max_new_tokens), template=None, form="pair")
    with progress_bar(console, "reading unseen digits", len(samples)) as progress:
        answer_shard(
            samples, prompting, ModelAnswerer(assistant, options.batch_size), folder, Shard(), options.batch_size,
            lambda count: progress(count, 0),
        )  # fmt: skip


def _draw(
    samples: Sequence[PictureSample],
    assistant: Assistant,
    options: RunOptions,
    settings: DigitsOptions,
    console: Console,
) -> None:
    folder = options.out / CREATION
    folder.mkdir(exist_ok=True)
    given = settings.drawing
    names = {field.name for field in fields(Drawing)} - {"candidates"}
    drawing = Drawing() if given is None else Drawing(**{name: getattr(given, name) for name in names})
    with progress_bar(console, "drawing digits", len(samples)) as progress:
        draw_shard(
            samples, drawing, ModelAnswerer(assistant, options.batch_size), None, folder, Shard(), options.batch_size,
            lambda count: progress(count, 0), settings.seed,
        )  # fmt: skip


def _count(
    assistant: Assistant,
    unseen: Scans,
    judge: DigitsJudge,
    options: RunOptions,
    settings: DigitsOptions,
    console: Console,
) -> dict[str, np.ndarray]:
    """Whether each continued document has the right word, a picture, the right digit in it; kept in a file."""
    path: Path = options.out / COUNTING_FILE
    if not path.is_file():
        drawing = _drawing(assistant, settings)
        with Bar(console) as bar:
            answers, following = continue_counting(
                assistant.engine, unseen.pictures, unseen.labels, settings, drawing, bar
            )
        word, dreamed, drawn = score_counting(answers, following, judge)
        values = {"word": word, "dreamed": dreamed, "drawn": drawn}
        write_text(path, json.dumps({name: flags.tolist() for name, flags in values.items()}) + "\n")
    return {name: np.array(flags) for name, flags in json.loads(path.read_text()).items()}


def _drawing(assistant: Assistant, settings: DigitsOptions) -> DrawingOptions:
    drawing = settings.drawing or drawing_defaults(assistant.engine.model)
    return replace(drawing, batch_size=settings.batch_size, candidates=1)


def _records(
    read: Sequence[dict[str, Any]],
    right: np.ndarray,
    asked: Sequence[PictureSample],
    wanted: np.ndarray,
    judged: np.ndarray,
) -> list[dict[str, Any]]:
    records = [{"kind": "caption", **r, "score": float(good)} for r, good in zip(read, right.tolist(), strict=True)]
    for i, (sample, number, found) in enumerate(zip(asked, wanted.tolist(), judged.tolist(), strict=True)):
        values = {"kind": "creation", "index": i, "caption": sample.prompt.text(), "wanted": number, "judged": found}
        records.append({**values, "score": float(found == number)})
    return records


def _features(judge: DigitsJudge, pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(judge.features(pictures))


def _proportion(right: np.ndarray) -> Proportion:
    return Proportion(int(np.sum(right)), len(right))
