"""The static report as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from dreamkernels.report.kernels import KernelReport

_HEADER = ("kernel", "regs", "spill", "shared", "blocks", "occup.", "limited by", "16-byte", "narrower", "tensor core")


def _accesses(row: KernelReport) -> tuple[int, int]:
    wide = sum(count for kind, count in row.global_accesses.items() if kind.endswith((" 16 B", " 32 B")))
    return wide, sum(row.global_accesses.values()) - wide


def _aligned(table: Sequence[Sequence[str]], left: set[int]) -> list[str]:
    widths = [max(len(line[k]) for line in table) for k in range(len(table[0]))]
    lines = [
        "  ".join(
            text.ljust(width) if k in left else text.rjust(width)
            for k, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def as_table(architecture: str, rows: Sequence[KernelReport], problems: Sequence[str]) -> str:
    """One line per kernel: per thread registers and spilled bytes, per block shared bytes, per multiprocessor blocks
    and occupancy, and the numbers of 16-byte and of narrower global memory instructions."""
    table = [_HEADER]
    for row in rows:
        wide, narrow = _accesses(row)
        table.append(
            (
                f"{row.source}: {row.name}",
                str(row.registers),
                str(row.spill_bytes),
                str(row.shared_bytes),
                str(row.blocks_per_sm),
                f"{100 * row.occupancy:.0f}%",
                row.limited_by,
                str(wide),
                str(narrow),
                " ".join(f"{count} {kind}" for kind, count in row.tensor_core.items()) or "-",
            )
        )
    lines = _aligned(table, left={0, 6, 9})
    spilling = sum(bool(row.spill_bytes or row.local_memory_instructions) for row in rows)
    compared = f"{len(problems)} problems against the recorded baseline"
    summary = f"{architecture}: {len(rows)} kernels, {spilling} with spills, {compared}"
    return "\n".join([*lines, "", summary, *(f"  {problem}" for problem in problems), ""])


def as_prediction(architecture: str, rows: Sequence[KernelReport]) -> str:
    """Kernels with tensor-core loops in the order that the scoreboard model expects, fastest first."""
    predicted = sorted(((row, row.prediction) for row in rows if row.prediction), key=lambda pair: -pair[1].tflops)
    if not predicted:
        return f"{architecture}: no kernel has a main loop on tensor cores\n"
    table = [("kernel", "cycles/iteration", "tensor busy", "model TFLOP/s")]
    table += [
        (row.name, f"{p.cycles_per_iteration:.0f}", f"{100 * p.tensor_share:.0f}%", f"{p.tflops:.0f}")
        for row, p in predicted
    ]
    title = f"{architecture}: predicted order of main loops. UNVALIDATED model: no figure here was measured on a GPU"
    return "\n".join([title, *_aligned(table, left={0}), ""])
