"""Language tasks by lm-eval, from local files, on DreamLLM's language model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from rich.console import Console

from dreamllm.evaluation.benchmarks.base import Figure, LanguageBenchmark
from dreamllm.evaluation.benchmarks.language import data_files, subjects
from dreamllm.evaluation.page import Example
from dreamllm.evaluation.records import RECORDS_FILE, write_records
from dreamllm.evaluation.run import Results, RunOptions, claim, report
from dreamllm.inference import load
from dreamllm.training import write_text

RESPONSES = "responses"
"""lm-eval's own store of the answers that the model has given, one row each, in the folder of the run."""

MMLU = "mmlu"
SHOWN_QUESTION = 300
_FIRST_EXAMPLE = re.compile(r"(?<=\n\n).*?\nAnswer: [A-D]\n\n", re.DOTALL)
LocalFiles = tuple[str, dict[str, list[str]]]


class LanguageModel(HFLM):
    """A prompt that is too long for the context loses its first examples, whole ones, as in the original."""

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        shorter: str | None = context
        while shorter is not None:
            encoded = super()._encode_pair(shorter, continuation)
            if sum(map(len, encoded)) <= self.max_length:
                break
            shorter = without_first_example(shorter)
        return encoded


def without_first_example(context: str) -> str | None:
    """MMLU's description, examples and question, less the first example; None where there is none."""
    shorter = _FIRST_EXAMPLE.sub("", context, count=1)
    return shorter if shorter != context else None


def run_language(benchmark: LanguageBenchmark, options: RunOptions, console: Console | None = None) -> Results:
    """Accuracy of `benchmark`.

    A run that was ended goes on with what lm-eval has stored of it: each answer that the model gave. They are then
    computed in other company than without the interruption, so log-probabilities agree to rounding; with batches of
    one to the bit. Raises `DataFolderError` before the model is loaded, and `ConfigurationChangedError` when the folder
    holds another run.
    """
    files = local_files(benchmark, options.data)
    claim(benchmark, options, options.limit or 0, 1, console or Console(stderr=True))
    changes = benchmark.original if options.protocol == "original" else {}
    engine = load(options.model, options.device, options.dtype).engine
    model = LanguageModel(
        pretrained=engine.model.language_model,
        tokenizer=engine.processor.tokenizer,
        backend="causal",
        batch_size=options.batch_size,
        max_length=engine.layout.max_length,
        add_bos_token=options.protocol == "plain",
    )
    found = simple_evaluate(
        model=model,
        tasks=write_tasks(files, options.out / "tasks", changes),
        num_fewshot=benchmark.shots,
        limit=options.limit,
        bootstrap_iters=0,
        log_samples=True,
        use_cache=str(options.out / RESPONSES),
        task_manager=TaskManager(include_defaults=False),  # all tasks are given as files
    )
    assert found is not None
    records = [
        record for name in sorted(found["samples"]) for record in _records(name, found["samples"][name], benchmark.key)
    ]
    write_records(options.out / RECORDS_FILE, records)
    figures = [Figure(_mean(records), "accuracy")]
    if benchmark.task == MMLU:
        names = sorted({record["task"] for record in records})
        figures += [Figure(_mean([r for r in records if r["task"] == name]), name) for name in names]
    examples = [
        Example(None, record["question"][-SHOWN_QUESTION:], record["chosen"], (record["target"],), record["score"])
        for record in records
    ]
    how = {"harness": "lm-eval", "metric": benchmark.key, "shots": benchmark.shots, "changes": dict(changes)}
    return report(benchmark, options, figures, examples, how)


def local_files(benchmark: LanguageBenchmark, data: Path) -> dict[str, LocalFiles]:
    """The files of each of lm-eval's tasks that `benchmark` consists of."""
    if benchmark.task != MMLU:
        return {benchmark.task: data_files(data, ("validation",))}
    return {f"{MMLU}_{subject}": data_files(data / subject, ("test", "dev")) for subject in subjects(data)}


@cache
def known_tasks() -> Mapping[str, Any]:
    """lm-eval's definitions by name, which it reads from thousands of files."""
    return TaskManager().task_index


def write_tasks(files: Mapping[str, LocalFiles], folder: Path, changes: Mapping[str, Any]) -> list[str]:
    """lm-eval's own task definitions, but with local files instead of a hub's and with `changes`; returns their paths.

    Raises `ValueError` for a task that this lm-eval does not have.
    """
    known = known_tasks()
    folder.mkdir(exist_ok=True)
    paths = []
    for task, (kind, splits) in files.items():
        if task not in known:
            raise ValueError(f"lm-eval has no task {task!r}")
        changed = {
            "include": str(known[task].yaml_path),
            "task": task,
            "dataset_path": kind,
            "dataset_name": None,
            "dataset_kwargs": {"data_files": splits},
            "training_split": None,
            **changes,
        }
        path = folder / f"{task}.yaml"
        write_text(path, json.dumps(changed, indent=2))  # JSON is YAML
        paths.append(str(path))
    return paths


def _records(task: str, samples: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    records = []
    for sample in sorted(samples, key=lambda s: s["doc_id"]):
        likelihoods = [response[0] for response in sample["filtered_resps"]]
        asked = [_argument(sample, i) for i in range(len(likelihoods))]
        best = max(range(len(likelihoods)), key=lambda i: likelihoods[i])
        score = float(sample[key])
        choices = [str(continuation).strip() for _, continuation in asked]
        target = str(sample["target"]).strip()
        if len(asked) == 2 and choices[0] == choices[1]:  # WinoGrande: what differs stands before
            choices = [str(context) for context, _ in asked]
            target = choices[best if score else 1 - best]
        elif target.isdecimal() and int(target) < len(choices):
            target = choices[int(target)]
        said = {"question": str(asked[0][0]), "chosen": choices[best], "target": target}
        records.append(
            {"index": sample["doc_id"], "task": task, **said, "log_likelihoods": likelihoods, "score": score}
        )
    return records


def _argument(sample: dict[str, Any], choice: int) -> Sequence[Any]:
    """Context and continuation of one choice."""
    arguments = sample["arguments"]
    if isinstance(arguments, dict):
        values = arguments[f"gen_args_{choice}"]
        return values["arg_0"], values["arg_1"]
    return arguments[choice]


def _mean(records: Sequence[dict[str, Any]]) -> float:
    return sum(record["score"] for record in records) / len(records)
