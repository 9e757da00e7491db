"""What a person sees of a run: a bar on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers.utils import logging as transformers_logging

LINES_PER_STAGE = 5


def say(console: Console, message: str) -> None:
    """Prints a line as it is, neither wrapped nor coloured."""
    console.print(message, soft_wrap=True, highlight=False, markup=False)


def plain_table(*columns: tuple[str, Literal["left", "right", "fold"]]) -> Table:
    """A table without lines. Columns are `left` or `right`, or `fold`: left, and over several lines where too long."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, kind in columns:
        table.add_column(name, justify="right" if kind == "right" else "left", no_wrap=kind != "fold", overflow="fold")
    return table


class StageProgress:
    """Progress of anything with `steps` steps: `advance` each step, `show` what is known of a step."""

    def __init__(self, console: Console, name: str, steps: int, done: int) -> None:
        self.console, self.name, self.steps, self.shown = console, name, steps, done
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[losses]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(name, total=steps, completed=done, losses="")

    def __enter__(self) -> StageProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.advance(self._task)

    def show(self, step: int, text: str) -> None:
        """`text` about step `step`: beside the bar, or as a line of its own each time a fifth of the way is done."""
        if self._bar is not None:
            self._bar.update(self._task, losses=text)
        elif step * LINES_PER_STAGE // self.steps > self.shown * LINES_PER_STAGE // self.steps:
            say(self.console, f"{self.name} step {step}/{self.steps} {text}")
        self.shown = step


def describe_line(line: dict[str, Any]) -> str:
    """Losses, speed, waiting and memory of a line of metrics:
    `lm 1.234 vm 0.567 81.2 documents/s 5,120 tokens/s 12.0 drawn/s data 3% 1.2 GiB`."""
    losses = [f"{key.removesuffix('_loss')} {line[key]:.3f}" for key in ("lm_loss", "vm_loss") if line[key] is not None]
    seconds = max(line["seconds"], 1e-3)
    parts = [*losses, f"{line['documents'] / seconds:.1f} documents/s", f"{line['tokens'] / seconds:,.0f} tokens/s"]
    if line["pictures"]:
        parts.append(f"{line['pictures'] / seconds:.1f} drawn/s")
    parts += [f"data {100 * line['data_seconds'] / seconds:.0f}%", f"{line['memory_bytes'] / 2**30:.1f} GiB"]
    return " ".join(parts)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' own progress bars, which would write into ours."""
    before = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            transformers_logging.enable_progress_bar()
