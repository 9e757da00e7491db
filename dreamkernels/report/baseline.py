"""The recorded report of every kernel, and what counts as a regression against it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from dreamkernels.report.kernels import KernelReport

# Compilers of different versions differ by a few registers; a kernel that loses blocks per multiprocessor is a
# regression regardless.
REGISTER_TOLERANCE = 1.15
_FOLDER = Path(__file__).resolve().parent


def _path(architecture: str) -> Path:
    return _FOLDER / f"baseline_{architecture}.json"


def load_baseline(architecture: str) -> dict[str, dict[str, object]]:
    """The recorded rows by "source name"."""
    return json.loads(_path(architecture).read_text())["kernels"]


def save_baseline(architecture: str, rows: Iterable[KernelReport], versions: dict[str, str]) -> Path:
    """Writes the recorded report; commit the file together with the change that explains it."""
    kernels = {
        f"{row.source} {row.name}": {
            "registers": row.registers,
            "shared_bytes": row.shared_bytes,
            "blocks_per_sm": row.blocks_per_sm,
            "instructions": row.instructions,
            "global_accesses": row.global_accesses,
            **({"tensor_core": row.tensor_core} if row.tensor_core else {}),
        }
        for row in rows
    }
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(kernels[name])}" for name in sorted(kernels))
    path = _path(architecture)
    head = f'  "architecture": {json.dumps(architecture)},\n  "versions": {json.dumps(versions)},\n'
    path.write_text(f'{{\n{head}  "kernels": {{\n{lines}\n  }}\n}}\n')
    return path


def compare_with_baseline(row: KernelReport, baseline: dict[str, dict[str, object]]) -> list[str]:
    """What is wrong with a kernel: spills, or worse than recorded. Empty when all is well."""
    name = f"{row.source} {row.name} on {row.architecture}"
    problems = []
    if row.spill_bytes or row.local_memory_instructions:
        problems.append(
            f"{name} spills: {row.spill_bytes} B stack, {row.local_memory_instructions} local-memory instructions"
        )
    recorded = baseline.get(f"{row.source} {row.name}")
    if recorded is None:
        return [*problems, f"{name} has no recorded baseline; run: python -m dreamkernels report --save-baseline"]
    registers, blocks = int(str(recorded["registers"])), int(str(recorded["blocks_per_sm"]))
    if row.registers > registers * REGISTER_TOLERANCE:
        problems.append(f"{name} uses {row.registers} registers, recorded {registers}")
    if row.blocks_per_sm < blocks:
        problems.append(f"{name} fits {row.blocks_per_sm} blocks per multiprocessor, recorded {blocks}")
    widths = recorded["global_accesses"]
    assert isinstance(widths, dict)
    lost = [
        kind for kind in ("load 16 B", "store 16 B") if widths.get(kind, 0) and not row.global_accesses.get(kind, 0)
    ]
    problems += [f"{name} lost its {kind} accesses: {row.global_accesses}" for kind in lost]
    products = recorded.get("tensor_core", {})
    assert isinstance(products, dict)
    problems += [
        f"{name} lost its {kind} instructions: {row.tensor_core}" for kind in products if kind not in row.tensor_core
    ]
    return problems
