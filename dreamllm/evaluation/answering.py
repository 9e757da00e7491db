"""One shard of a benchmark of questions: prompts, batches, answers on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from dreamllm.documents import Document, load_picture
from dreamllm.evaluation.answerer import Answerer
from dreamllm.evaluation.benchmarks.base import Prompting, Sample
from dreamllm.evaluation.records import AnswerFile, Shard

SEED = 42
"""Of the first sample; sample i has the seed SEED + i, whatever its shard and batch."""

Item = TypeVar("Item")


def answer_shard(
    samples: Sequence[Sample],
    prompting: Prompting,
    answerer: Answerer,
    folder: Path,
    shard: Shard,
    batch_size: int,
    done: Callable[[int], None] = lambda count: None,
) -> None:
    """Answers the samples of `shard` that are not answered yet; `done` is told how many of them are.

    The pictures of the next batch are decoded in the background. Raises `PictureError` for a picture that cannot be
    read and what the answerer raises; what was answered before stays.
    """
    indices = shard.samples(len(samples))
    file = AnswerFile(shard.file(folder), indices)
    count = file.resume(batch_size)
    done(count)
    rest = indices[count:]
    batches = [rest[i : i + batch_size] for i in range(0, len(rest), batch_size)]
    for batch, decoded in zip(batches, ahead(lambda b: [_decoded(samples[i]) for i in b], batches), strict=True):
        file.append(_answer_batch(batch, decoded, prompting, answerer))
        count += len(batch)
        done(count)


def ahead(work: Callable[[Item], Any], items: Sequence[Item]) -> Iterator[Any]:
    """`work` of each item, in order; the next one is already being worked on in another thread."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        futures = [thread.submit(work, item) for item in items[:1]]
        for i in range(len(items)):
            result = futures[i].result()
            if i + 1 < len(items):
                futures.append(thread.submit(work, items[i + 1]))
            yield result


def _decoded(sample: Sample) -> Sample:
    return replace(sample, picture=load_picture(sample.picture, f"of sample {sample.id}"))


def _answer_batch(
    indices: Sequence[int], samples: Sequence[Sample], prompting: Prompting, answerer: Answerer
) -> list[dict[str, Any]]:
    seeds = [SEED + i for i in indices]
    records: list[dict[str, Any]] = [
        {"index": index, "id": sample.id, "question": sample.question}
        for index, sample in zip(indices, samples, strict=True)
    ]
    questions = [sample.question for sample in samples]
    asked = list(range(len(samples)))
    if prompting.probe is not None:
        asked = _probe(prompting, samples, records, questions, answerer, seeds)
    prompts = [_prompt(prompting, samples[i], questions[i], answerer) for i in asked]
    texts = answerer.answers(prompts, prompting.decoding, [seeds[i] for i in asked]) if prompts else []
    for i, text in zip(asked, texts, strict=True):
        records[i] |= {"answer": text, "prediction": prompting.cleaned(text)}
    for record, sample in zip(records, samples, strict=True):
        record |= {"references": list(sample.references), "details": dict(sample.details)}
    return records


def _probe(
    prompting: Prompting,
    samples: Sequence[Sample],
    records: list[dict[str, Any]],
    questions: list[str],
    answerer: Answerer,
    seeds: Sequence[int],
) -> list[int]:
    """Asks first whether the answer can be known; returns the samples that are still to be asked."""
    probe = prompting.probe
    assert probe is not None
    alone = replace(prompting, system="", request="", start="", probe=None)
    prompts = [_prompt(alone, sample, sample.question + probe.text, answerer) for sample in samples]
    replies = answerer.answers(prompts, prompting.decoding, seeds)
    asked = []
    for i, (sample, reply) in enumerate(zip(samples, replies, strict=True)):
        records[i]["probe"] = reply
        denied = probe.denied(reply)
        if denied and probe.instead is not None:
            records[i] |= {"answer": probe.instead, "prediction": probe.instead}
            continue
        if denied:
            questions[i] += numbered_options(sample.details["options"].values())
        asked.append(i)
    return asked


def _prompt(prompting: Prompting, sample: Sample, question: str, answerer: Answerer) -> Document:
    options = sample.details.get("options", {})
    return prompting.document(sample.picture, question, answerer.template, f"sample {sample.id}", options)


def numbered_options(options: Iterable[str]) -> str:
    """Options as the original appends them: " Options: (0). ... (1). ..."."""
    return " Options: " + " ".join(f"({i}). {option}" for i, option in enumerate(options))
