"""The committed static report of the GPU kernels, one line per kernel family."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.reporting.tables import NOTHING, Table

BASELINES = Path(__file__).resolve().parent.parent.parent / "dreamkernels" / "report"


def static_report(architecture: str, folder: Path = BASELINES) -> tuple[Table, str] | None:
    """A table and a sentence on its origin. None where no baseline of the architecture is there."""
    path = folder / f"baseline_{architecture}.json"
    if not path.is_file():
        return None
    baseline = json.loads(path.read_text(encoding="utf-8"))
    families: dict[str, list[dict[str, Any]]] = {}
    for name, kernel in baseline["kernels"].items():
        source, rest = name.split(" ", 1)
        families.setdefault(f"{re.split(r'[<. ]', rest)[0]} ({source})", []).append(kernel)
    header = ["kernel", "configurations", "registers", "shared memory, KiB", "blocks per SM", "16-byte accesses",
              "tensor cores"]  # fmt: skip
    rows = [
        [
            name,
            str(len(kernels)),
            _range([kernel["registers"] for kernel in kernels]),
            _range([round(kernel["shared_bytes"] / 1024, 1) for kernel in kernels]),
            _range([kernel["blocks_per_sm"] for kernel in kernels]),
            f"{sum(any('16 B' in kind for kind in k['global_accesses']) for k in kernels)} of {len(kernels)}",
            _of(sum("tensor_core" in kernel for kernel in kernels), len(kernels)),
        ]
        for name, kernels in sorted(families.items())
    ]
    versions = ", ".join(f"{name} {version}" for name, version in baseline.get("versions", {}).items())
    note = (
        f"{len(baseline['kernels'])} compiled configurations for {architecture} ({versions}), from the recorded "
        "baseline; ranges are over a kernel's configurations. Nothing here was run on a GPU. Spills are not a column: "
        "the baseline does not record them because none is allowed, and tests/kernels/aot fail on any. "
        "Line by line: python -m dreamkernels report."
    )
    return Table(header, rows), note


def _of(count: int, total: int) -> str:
    return f"{count} of {total}" if count else NOTHING


def _range(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
