"""`dreamllm data index`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dreamllm.data.interleaved import group_documents
from dreamllm.data.locate import existing, find_tars
from dreamllm.data.recognise import recognise
from dreamllm.data.tar_index import Grouping, Layout, cached_index_path, index_path, write_index
from dreamllm.data.tars import group_pairs

GROUPINGS: dict[Layout, Grouping] = {"pairs": group_pairs, "interleaved": group_documents}


def index(
    path: Path,
    layout: Literal["pairs", "interleaved", "auto"] = "auto",
    out: Path | None = None,
    threads: int = 8,
) -> None:
    """Writes an index of tars, so that a run need not walk through them at each start.

    Args:
        path: a tar, a folder of tars, or a JSON list of tars.
        layout: pairs, or interleaved documents (each JSON followed by its pictures); by default what the tars hold.
        out: folder for the index; by default the data's own folder, or ~/.cache/dreamllm where that is read-only.
        threads: tars walked through at the same time.
    """
    if threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    path = existing(path)
    tars = find_tars(path)
    chosen: Layout = "interleaved" if recognise(path) == "interleaved_tars" else "pairs"
    if layout != "auto":
        chosen = layout
    target = _writable(path, chosen) if out is None else cached_index_path(path, chosen, out)
    target.parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    columns = TextColumn("indexing"), BarColumn(), MofNCompleteColumn(), TextColumn("tars"), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=len(tars))
        written = write_index(
            tars, chosen, GROUPINGS[chosen], path, target, threads, lambda tar: bar.update(task, advance=1)
        )
    samples = sum(tar.samples for tar in written.tars)
    print(f"{target}: {samples} {'documents' if chosen == 'interleaved' else 'pairs'} in {len(tars)} tars")


def _writable(path: Path, layout: Layout) -> Path:
    beside = index_path(path, layout)
    return beside if os.access(beside.parent, os.W_OK) else cached_index_path(path, layout)
