"""Language tasks, by lm-eval on the language model alone (spec section G.2): zero-shot choices by log-probability."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreamllm.evaluation.benchmarks.base import LanguageBenchmark
from dreamllm.evaluation.files import DataFolderError, listing

SUFFIXES = (".parquet", ".jsonl")
NO_SUBJECTS = ("all", "auxiliary_train")
"""Folders that MMLU is distributed with beside those of its subjects."""

# The specification says of what these two prompts of the original consist; the words of their instructions are ours.
BOOLQ = {
    "doc_to_text": "Choose the answer to the question from yes and no.\n"
    "{{passage}}\nQuestion: {{question|capitalize}}?\nAnswer:",
    "doc_to_choice": ["No", "Yes"],
}
SIQA = {
    "doc_to_text": "Choose the answer to the question.\nContext: {{context}}\nQuestion: {{question}}\nAnswer:",
}


def data_files(folder: Path, splits: tuple[str, ...]) -> tuple[str, dict[str, list[str]]]:
    """The kind of the files in `folder` and, for each split, those whose names begin with it.

    Raises `DataFolderError` naming the split without files.
    """
    if not folder.is_dir():
        raise DataFolderError(f"the data folder {folder} does not exist")
    for suffix in SUFFIXES:
        found = {split: [str(path) for path in sorted(folder.glob(f"{split}*{suffix}"))] for split in splits}
        if all(found.values()):
            return ("json" if suffix == ".jsonl" else "parquet"), found
    wanted = " and ".join(f"{split}*.parquet" for split in splits)
    raise DataFolderError(f"{folder} has no {wanted} (or .jsonl); it holds {listing(folder)}")


def subjects(folder: Path) -> list[str]:
    """Names of the subjects of MMLU that `folder` has, one folder each. Raises `DataFolderError` for none."""
    if not folder.is_dir():
        raise DataFolderError(f"the data folder {folder} does not exist")
    folders = [path.name for path in folder.iterdir() if path.is_dir()]
    found = sorted(name for name in folders if not name.startswith(".") and name not in NO_SUBJECTS)
    if not found:
        raise DataFolderError(f"{folder} has no folder of a subject; it holds {listing(folder)}")
    return found


def _task(
    name: str, title: str, paper: str, task: str, key: str = "acc", original: Mapping[str, Any] | None = None
) -> LanguageBenchmark:
    files = ("validation*.parquet or .jsonl",)
    return LanguageBenchmark(
        name, title, "accuracy", "validation", files, paper, task=task, key=key, original=original or {}
    )


BENCHMARKS = (
    _task("piqa", "PIQA", "78.6", "piqa"),
    _task("hellaswag", "HellaSwag", "77.4", "hellaswag", "acc_norm"),
    _task("winogrande", "WinoGrande", "68.5", "winogrande"),
    _task("boolq", "BoolQ", "75.2", "boolq", original=BOOLQ),
    _task("siqa", "SIQA", "", "social_iqa", original=SIQA),
    LanguageBenchmark(
        "mmlu",
        "MMLU, 5-shot",
        "accuracy",
        "test",
        ("SUBJECT/test*.parquet or .jsonl", "SUBJECT/dev*.parquet or .jsonl"),
        "41.8",
        task="mmlu",
        key="acc",
        shots=5,
    ),
)
