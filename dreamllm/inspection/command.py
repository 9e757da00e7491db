"""`dreamllm data inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from dreamllm.data import make_reader
from dreamllm.data.locate import existing
from dreamllm.data.registry import recognised
from dreamllm.inspection.figures import figures, problem_rows
from dreamllm.inspection.page import page
from dreamllm.inspection.survey import Survey, survey
from dreamllm.model import DreamLLMProcessor


def inspect(
    path: str,
    kind: str = "auto",
    options: dict[str, Any] | None = None,
    model: Path | None = None,
    examine: int = 500,
    samples: int = 12,
    out: Path = Path("inspection.html"),
) -> None:
    """Prints what data holds and writes a page of documents as the model sees them.

    Args:
        path: a file or folder of data.
        kind: pair_tars, pair_folder, arrow, interleaved_tars, interleaved_lines, instructions or conversations; by
            default what the path holds.
        options: options of the kind, as YAML, such as '{mode: creation, filters: {min_size: 128}}'.
        model: a DreamLLM folder, whose tokenizer then counts and cuts as in training.
        examine: documents to look at, drawn at random. Their pictures are decoded.
        samples: documents on the page.
        out: the page.
    """
    for name, value, least in (("examine", examine, 1), ("samples", samples, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
    processor = None if model is None else DreamLLMProcessor.from_pretrained(model)
    kind = recognised(existing(path)) if kind == "auto" else kind
    reader = make_reader(kind, path, **(options or {}))
    console = Console()
    total = min(examine, len(reader))
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("looking", total=total)
        decode = None if processor is None else processor.decode_text
        found = survey(reader, kind, examine, samples, processor, decode, lambda: bar.advance(task))
    show(found, console)
    out.write_text(page(found, reader.name), encoding="utf-8")
    console.print(f"wrote {out}", soft_wrap=True, highlight=False, markup=False)


def show(found: Survey, console: Console) -> None:
    """Prints the figures and the problems."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, value in figures(found):
        table.add_row(name, Text(value))
    console.print(table)
    problems = problem_rows(found.log)
    if problems:
        table = Table(box=None, pad_edge=False, show_header=False)
        for reason, count, meaning, example in problems:
            table.add_row(reason, f"{count:,}", meaning, Text(_plain(example)))
        console.print()
        console.print(table)


def _plain(text: str) -> str:
    """Without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)
