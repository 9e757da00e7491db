"""`dreamllm train report`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from dreamllm.monitoring.page import write_run_page
from dreamllm.training.progress import say


def report(run: Path) -> None:
    """Writes a page about a run, finished or not: curves, samples, problems of its data, configuration.

    Args:
        run: folder of the run; the page is run.html in it.
    """
    say(Console(), f"wrote {write_run_page(run)}")
