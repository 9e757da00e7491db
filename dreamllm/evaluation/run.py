"""A run of a benchmark: a folder that fills up with answers, from one process or several, and ends in a report."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dreamllm.evaluation.answerer import Answerer, ModelAnswerer
from dreamllm.evaluation.answering import answer_shard
from dreamllm.evaluation.benchmarks import (
    AnswerBenchmark,
    Benchmark,
    Figure,
    PictureBenchmark,
    PictureSample,
    Protocol,
    Sample,
    find_benchmark,
)
from dreamllm.evaluation.benchmarks.mmvet import load_judge, score_with
from dreamllm.evaluation.drawing import Networks, draw_shard, load_networks, picture_file, score_pictures
from dreamllm.evaluation.files import DataFolderError, check_pictures
from dreamllm.evaluation.page import Example, Page, write_page
from dreamllm.evaluation.progress import progress_bar
from dreamllm.evaluation.records import RECORDS_FILE, Shard, complete_lines, merged, write_records
from dreamllm.inference import load
from dreamllm.training import claim_folder, locked, make_folder, write_text

RUN_FILE, RESULTS_FILE, REPORT_FILE = "run.json", "results.json", "report.html"
FINGERPRINT_BYTES = 1 << 20


@dataclass(frozen=True)
class RunOptions:
    """How a benchmark is run; see `dreamllm evaluate --help`."""

    model: Path
    data: Path
    out: Path
    protocol: Protocol = "original"
    limit: int | None = None
    batch_size: int = 8
    device: str = "cpu"
    dtype: str = "float32"
    shard: Shard = field(default_factory=Shard)
    judge: str | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, not {self.limit}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")


Results = dict[str, Any]
LoadAnswerer = Callable[[RunOptions], Answerer]


def model_answerer(options: RunOptions) -> Answerer:
    """The model of the options, loaded."""
    assistant = load(options.model, options.device, options.dtype, options.batch_size)
    return ModelAnswerer(assistant, options.batch_size)


def run_benchmark(
    benchmark: Benchmark,
    options: RunOptions,
    processes: int = 1,
    console: Console | None = None,
    answerer: LoadAnswerer = model_answerer,
) -> Results | None:
    """Runs `benchmark` into `options.out`, or goes on where a run into this folder was ended.

    `processes` > 1 share the samples out and run at once. Returns the results; None when this was one shard of several
    and others are not complete (whichever is complete last writes the results).

    Raises `DataFolderError` for data that are not there, before anything is loaded; `ConfigurationChangedError` when
    the folder holds another run; `ValueError` for options that do not fit together.
    """
    console = console or Console(stderr=True)
    if processes > 1 and options.shard != Shard():
        raise ValueError("give processes or a shard, not both")
    judge = None if options.judge is None else load_judge(options.judge)
    if judge is not None and benchmark.name != "mm-vet":
        raise ValueError(f"{benchmark.title} is not graded by a judge; leave it away")
    samples = load_samples(benchmark, options)
    shards = processes if processes > 1 else options.shard.count
    claim(benchmark, options, len(samples), shards, console)
    with progress_bar(console, benchmark.title, len(samples) if processes > 1 else None) as progress:
        if processes > 1:
            _run_processes(benchmark, options, processes, progress)
        else:
            work(benchmark, options, samples, answerer, progress)
    answers = merged(options.out, len(samples), shards)
    if answers is None:
        return None
    if isinstance(benchmark, PictureBenchmark):
        return _finish_pictures(benchmark, options, samples, answers)
    assert isinstance(benchmark, AnswerBenchmark)
    scored = score_with(judge, answers) if judge is not None else benchmark.score(answers)
    return _finish_answers(benchmark, options, samples, answers, scored.figures, scored.each)


def load_samples(benchmark: Benchmark, options: RunOptions) -> Sequence[Any]:
    """The samples to evaluate on, every picture of them there. Raises `DataFolderError`."""
    assert isinstance(benchmark, AnswerBenchmark | PictureBenchmark)
    samples: Sequence[Sample | PictureSample] = benchmark.load(options.data)
    if not samples:
        raise DataFolderError(f"{options.data} holds no sample of {benchmark.title} ({benchmark.split})")
    samples = samples[: options.limit]
    check_pictures([s.picture for s in samples if isinstance(s, Sample) and isinstance(s.picture, Path)], options.data)
    return samples


def claim(
    benchmark: Benchmark, options: RunOptions, total: int, shards: int, console: Console, protocol: str = ""
) -> None:
    """Makes the folder this run's, or checks that it is. `protocol`: where a benchmark has its own."""
    make_folder(options.out)
    configuration = {
        "benchmark": benchmark.name,
        "protocol": protocol or options.protocol,
        "model": fingerprint(options.model),
        "dtype": options.dtype,
        "samples": total,
        "shards": shards,
    }
    with locked(options.out):  # shards may begin at the same moment
        claim_folder(options.out / RUN_FILE, configuration, say=lambda text: console.print(text, markup=False))


def fingerprint(model: Path) -> str:
    """Name, and a digest of the configuration and of size, beginning and end of each weight file.

    A folder that is called just "model" is named with the folder it lies in.
    """
    digest = hashlib.sha256()
    place = model.resolve()
    name = f"{place.parent.name}/{place.name}" if place.name == "model" else place.name
    for path in sorted([*model.glob("*.safetensors"), *model.glob("config.json")]):
        with open(path, "rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            digest.update(file.read(FINGERPRINT_BYTES))
            file.seek(max(0, path.stat().st_size - FINGERPRINT_BYTES))
            digest.update(file.read())
    return f"{name} {digest.hexdigest()[:16]}"


def work(
    benchmark: Benchmark,
    options: RunOptions,
    samples: Sequence[Any],
    answerer: LoadAnswerer,
    progress: Callable[[int, int], None],
) -> None:
    """Completes the shard of `options`; loads no model where there is nothing to do."""
    shard = options.shard
    total = len(shard.samples(len(samples)))
    if len(complete_lines(shard.file(options.out))) == total:
        return
    if isinstance(benchmark, PictureBenchmark):
        drawing = benchmark.drawing[options.protocol]
        clip = load_networks(benchmark, drawing, options.data, options.device).clip
        draw_shard(
            samples, drawing, answerer(options), clip, options.out, shard, options.batch_size,
            lambda count: progress(count, total),
        )  # fmt: skip
    else:
        assert isinstance(benchmark, AnswerBenchmark)
        answer_shard(
            samples, benchmark.prompting[options.protocol], answerer(options), options.out, shard, options.batch_size,
            lambda count: progress(count, total),
        )  # fmt: skip


def _finish_answers(
    benchmark: AnswerBenchmark,
    options: RunOptions,
    samples: Sequence[Sample],
    answers: Sequence[dict[str, Any]],
    figures: Sequence[Figure],
    each: Sequence[float | None],
) -> Results:
    records = [{**answer, "score": score} for answer, score in zip(answers, each, strict=True)]
    write_records(options.out / RECORDS_FILE, records)
    if benchmark.submission is not None:
        name, write = benchmark.submission
        write(options.out / name, records)
    examples = [
        Example(sample.picture, sample.question, str(record["prediction"]), sample.references, record["score"])
        for sample, record in zip(samples, records, strict=True)
    ]
    prompting = benchmark.prompting[options.protocol]
    template = "the model's own" if prompting.template is None else prompting.template.name
    how = {"prompting": asdict(prompting) | {"template": template}, "tokenizer": "own"}
    return report(benchmark, options, figures, examples, how)


def _finish_pictures(
    benchmark: PictureBenchmark,
    options: RunOptions,
    samples: Sequence[PictureSample],
    answers: Sequence[dict[str, Any]],
) -> Results:
    drawing = benchmark.drawing[options.protocol]
    networks: Networks = load_networks(benchmark, drawing, options.data, options.device)
    figures = score_pictures(benchmark, networks, options.data, options.out, answers)
    write_records(options.out / RECORDS_FILE, answers)
    examples = [
        Example(picture_file(options.out, i), "", sample.prompt.text(), (), _agreement(answer))
        for i, (sample, answer) in enumerate(zip(samples, answers, strict=True))
    ]
    how = {"drawing": asdict(drawing), "side": benchmark.side, "resize": benchmark.resize}
    return report(benchmark, options, figures, examples, how)


def _agreement(answer: dict[str, Any]) -> float | None:
    return answer["agreement"][answer["candidate"]] if "agreement" in answer else None


def report(
    benchmark: Benchmark,
    options: RunOptions,
    figures: Sequence[Figure],
    examples: Sequence[Example],
    how: dict[str, Any],
    protocol: str = "",
) -> Results:
    """Writes `results.json` and the page. `protocol`: where a benchmark has its own."""
    results: Results = {
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "split": benchmark.split,
        "protocol": protocol or options.protocol,
        "model": fingerprint(options.model),
        "samples": len(examples),
        "limit": options.limit,
        "figures": [figure.to_json() for figure in figures],
        "paper": benchmark.paper,
        **how,
    }
    write_text(options.out / RESULTS_FILE, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    page = Page(results, tuple(figures), tuple(examples), beside(options.out, results))
    write_text(options.out / REPORT_FILE, write_page(page))
    return results


def beside(out: Path, results: Results) -> dict[str, str]:
    """Headline figures by benchmark of this run and of those beside it with the same model and protocol.

    A figure on the first samples only is followed by their number.
    """
    found: dict[str, str] = {}
    for path in sorted(out.resolve().parent.glob(f"*/{RESULTS_FILE}")):
        try:
            other = json.loads(path.read_text(encoding="utf-8"))
            same = all(other[key] == results[key] for key in ("model", "protocol"))
            value = other["figures"][0]["value"]
            limited = f" ({other['samples']})" if other["limit"] is not None else ""
        except (ValueError, KeyError, IndexError, TypeError):
            continue  # a file of this name that is not ours
        if same and value is not None:
            found[other["benchmark"]] = f"{value:.2f}{limited}"
    return found


# -- processes ---------------------------------------------------------------------------------------------------------


def _run_processes(
    benchmark: Benchmark, options: RunOptions, processes: int, progress: Callable[[int, int], None]
) -> None:
    context = get_context("spawn")
    running: list[BaseProcess] = []
    for index in range(processes):
        own = replace(options, shard=Shard(index, processes), device=_device(options.device, index))
        running.append(context.Process(target=_process, args=(benchmark.name, own, processes), daemon=True))
    try:
        for process in running:
            process.start()
        while any(process.is_alive() for process in running):
            if any(process.exitcode not in (None, 0) for process in running):
                break
            progress(_answered(options.out, processes), 0)
            time.sleep(0.5)
    finally:
        for process in running:
            if process.is_alive():
                process.terminate()
        for process in running:
            process.join()
    broken = [index for index, process in enumerate(running) if process.exitcode]
    if broken:
        raise ValueError(f"process {broken[0]} of {processes} failed (see above); the same command goes on from there")


def _process(name: str, options: RunOptions, processes: int) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    benchmark = find_benchmark(name)
    try:
        work(benchmark, options, load_samples(benchmark, options), model_answerer, lambda done, total: None)
    except (ValueError, OSError, ImportError) as error:
        print(f"process {options.shard.index}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _device(device: str, index: int) -> str:
    """`cuda` alone means a GPU of its own for each process."""
    return f"cuda:{index % max(1, torch.cuda.device_count())}" if device == "cuda" else device


def _answered(out: Path, shards: int) -> int:
    files = [Shard(index, shards).file(out) for index in range(shards)]
    return sum(path.read_bytes().count(b"\n") for path in files if path.is_file())
