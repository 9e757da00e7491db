"""`dreamllm data index` and `dreamllm data build`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dreamllm.data.build import BuildSettings
from dreamllm.data.build import build as build_tars
from dreamllm.data.interleaved import InterleavedReader, group_documents
from dreamllm.data.locate import existing, find_tars
from dreamllm.data.pairs import Pairs
from dreamllm.data.recognise import recognise
from dreamllm.data.registry import make_reader
from dreamllm.data.tar_index import Grouping, Layout, cached_index_path, index_path, write_index
from dreamllm.data.tars import group_pairs

_SETTINGS = BuildSettings()
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


def build(
    kind: Literal["pair_tars", "interleaved_tars"],
    source: str,
    out: Path,
    source_kind: str = "auto",
    options: dict[str, Any] | None = None,
    settings: BuildSettings = _SETTINGS,
    processes: int = 1,
) -> None:
    """Converts data into tars. Rerun the same command to go on with an interrupted one.

    Args:
        kind: what to make: pair_tars or interleaved_tars.
        source: a file or folder of pairs, or of interleaved documents such as MMC4's JSON lines.
        out: folder for the tars.
        source_kind: kind of the source (see dreamllm data inspect); by default what it holds.
        options: options of the source, as YAML, such as '{images: pictures, filters: {min_similarity: 0.25}}'.
        settings: how shards are made.
        processes: shards written at the same time.
    """
    if processes < 1:
        raise ValueError(f"processes must be at least 1, not {processes}")
    reader = make_reader(source_kind, source, **(options or {}))
    makes = "pair_tars" if isinstance(reader, Pairs) else "interleaved_tars"
    if isinstance(reader, Pairs | InterleavedReader) and makes != kind:
        raise ValueError(f"{source} holds {type(reader).__name__}, from which {makes} are made, not {kind}")
    shards = -(-len(reader) // settings.samples_per_shard)
    console = Console(stderr=True)
    columns = TextColumn("building"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=2 * shards)  # written, verified
        log = build_tars(reader, out, settings, processes, lambda: bar.advance(task))
    print(f"{out}: {log.documents - log.bad} of {len(reader)} samples in {shards} tars, verified")
    if log.counts:
        print(log.summary())
    if log.documents == log.bad:
        raise ValueError(f"no sample of {source} could be used")


def _writable(path: Path, layout: Layout) -> Path:
    beside = index_path(path, layout)
    return beside if os.access(beside.parent, os.W_OK) else cached_index_path(path, layout)
