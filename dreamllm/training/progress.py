"""What a person sees of a run: a bar on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINES_PER_STAGE = 5


def say(console: Console, message: str) -> None:
    """Prints a line as it is, neither wrapped nor coloured."""
    console.print(message, soft_wrap=True, highlight=False, markup=False)


class StageProgress:
    """Progress of one stage of `steps` steps: `advance` each step, `show` each line of metrics."""

    def __init__(self, console: Console, name: str, steps: int, done: int) -> None:
        self.console, self.name, self.steps, self.done = console, name, steps, done
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
        self.done += 1
        if self._bar is not None:
            self._bar.advance(self._task)

    def show(self, line: dict[str, Any]) -> None:
        text = describe_line(line)
        if self._bar is not None:
            self._bar.update(self._task, losses=text)
        elif _is_sparse(line["step"], self.steps, previous=line["step"] - line["steps"]):
            say(self.console, f"{self.name} step {line['step']}/{self.steps} {text}")


def describe_line(line: dict[str, Any]) -> str:
    """Losses and speed of a line of metrics: `lm 1.234 vm 0.567 81.2 documents/s`."""
    losses = [f"{key.removesuffix('_loss')} {line[key]:.3f}" for key in ("lm_loss", "vm_loss") if line[key] is not None]
    speed = line["documents"] / max(line["seconds"], 1e-3)
    pictures = f" {line['pictures'] / max(line['seconds'], 1e-3):.1f} drawn/s" if line["pictures"] else ""
    return f"{' '.join(losses)} {speed:.1f} documents/s{pictures}"


def _is_sparse(step: int, steps: int, previous: int) -> bool:
    """Whether a fifth of the stage ended between `previous` and `step`."""
    return step * LINES_PER_STAGE // steps > previous * LINES_PER_STAGE // steps
