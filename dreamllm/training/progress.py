"""What a person sees of a run: a bar on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Literal

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from transformers.utils import logging as transformers_logging

LINES_PER_STAGE = 5
GAP = "  "
REFRESHES_PER_SECOND = 2
"""Drawing holds up Python, and with it the step."""


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
        self._bar: _Bar | None = None
        if console.is_terminal:
            self._bar = _Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
                refresh_per_second=REFRESHES_PER_SECOND,
                expand=True,
            )
            self._task = self._bar.add_task(name, total=steps, completed=done)

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
        """`text` about step `step`: below the bar, or as a line of its own each time a fifth of the way is done."""
        if self._bar is not None:
            self._bar.text = text
        elif step * LINES_PER_STAGE // self.steps > self.shown * LINES_PER_STAGE // self.steps:
            say(self.console, f"{self.name} step {step}/{self.steps} {text}")
        self.shown = step


class _Bar(Progress):
    """A bar over the width of the terminal, and below it as much of a line of text as has room."""

    text = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        parts = self.text.split(GAP)
        while len(parts) > 1 and len(GAP.join(parts)) > self.console.width:
            parts.pop()
        yield Text(GAP.join(parts), no_wrap=True, overflow="ellipsis")


def describe_line(line: dict[str, Any]) -> str:
    """Losses, speed, waiting and memory of a line of metrics, what matters most first:
    `lm 1.234  vm 0.567  5,120 tok/s  12.0 drawn/s  61% of peak  data 3%  1.2 GiB  81.2 docs/s`. Without a known peak,
    in operations per second: `1.23 TFLOP/s`."""
    losses = [f"{key.removesuffix('_loss')} {line[key]:.3f}" for key in ("lm_loss", "vm_loss") if line[key] is not None]
    seconds = max(line["seconds"], 1e-3)
    parts = [*losses, f"{line['tokens'] / seconds:,.0f} tok/s"]
    if line["pictures"]:
        parts.append(f"{line['pictures'] / seconds:.1f} drawn/s")
    if line["share_of_peak"] is not None:
        parts.append(f"{100 * line['share_of_peak']:.0f}% of peak")
    elif line["operations"]:
        parts.append(f"{line['operations'] / seconds / 1e12:.3g} TFLOP/s")
    parts += [f"data {100 * line['data_seconds'] / seconds:.0f}%", f"{line['memory_bytes'] / 2**30:.1f} GiB"]
    return GAP.join([*parts, f"{line['documents'] / seconds:.1f} docs/s"])


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
