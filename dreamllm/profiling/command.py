"""`dreamllm profile`."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from dreamllm.profiling.profile import profile_workload
from dreamllm.profiling.report import as_json, show
from dreamllm.training import make_folder, write_json
from dreamllm.training.progress import quiet_transformers, say

RESULT = "profile.json"


def profile(
    workload: str = "stage2",
    size: str = "mini",
    out: Path = Path("profile"),
    precision: Literal["float32", "bfloat16"] = "float32",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    documents_per_step: int | None = None,
    steps: int = 3,
    num_threads: int | None = None,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Profiles a training step: time and memory by part, host synchronisations, and a trace for Perfetto.

    Writes trace.json and profile.json, whose operators `dreamllm plan --records` takes.

    Args:
        workload: the stage whose step runs: stage1, stage1_comprehension, stage1_creation, stage2 or stage3.
        size: the model: tiny, mini or 7b, with random weights, on synthetic documents.
        out: folder for the trace and the figures.
        precision: float32, or bfloat16 (autocast; parameters stay float32).
        device: auto is CUDA when there is one.
        documents_per_step: documents packed into the step's batch; by default what suits the size.
        steps: steps that are timed; the least counts.
        num_threads: CPU threads of torch; by default torch's choice.
        seed: of the weights and the documents.
        json: print the figures as JSON instead of tables.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    console = Console(stderr=json)
    make_folder(out)
    with quiet_transformers():
        measured = profile_workload(workload, size, precision, device, documents_per_step, steps, seed, out, console)
    values = as_json(measured)
    write_json(out / RESULT, values)
    if json:
        print(dumps(values, indent=2))
        return
    show(measured, console)
    say(console, f"figures: {out / RESULT}")
