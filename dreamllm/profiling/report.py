"""A profile as tables for the terminal, as JSON values, and as records of operators for `dreamllm plan`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from dreamllm.profiling.operators import OTHER
from dreamllm.profiling.parts import PARTS
from dreamllm.profiling.profile import Profile
from dreamllm.profiling.recorder import GRADIENTS, Operator
from dreamllm.training.progress import plain_table, say

MIB = 2**20


def show(profile: Profile, console: Console) -> None:
    """Prints what a step takes, by part and, for the language model, by operator."""
    counts = profile.counts
    say(console, f"{profile.workload} {profile.size}, {profile.precision}, {profile.device}, {profile.threads} threads")
    say(
        console,
        f"one step: {counts.documents} documents, {counts.tokens} tokens, {counts.targets} language targets, "
        f"{counts.pictures} pictures to create",
    )
    say(console, "")
    console.print(_parts_table(profile))
    say(console, "")
    console.print(_operators_table("LLM by operator", [o for o in profile.recording.operators if o.part == "LLM"]))
    say(console, "")
    console.print(_memory_table(profile))
    say(console, "")
    say(
        console,
        f"step {1e3 * profile.step_seconds:.1f} ms (least of {profile.steps}), "
        f"{counts.documents / profile.step_seconds:.2f} documents/s, "
        f"{counts.tokens / profile.step_seconds:.0f} tokens/s, "
        f"{profile.recording.flops / profile.step_seconds / 1e9:.1f} GFLOP/s",
    )
    say(console, _synchronisations(profile))
    if profile.trace is not None:
        say(console, f"trace: {profile.trace} (open it in https://ui.perfetto.dev)")


def _synchronisations(profile: Profile) -> str:
    found = profile.synchronisations
    if not found:
        return "host synchronisations inside the step: 0"
    return "\n  ".join([f"host synchronisations inside the step, at {len(found)} places:", *found])


def _parts_table(profile: Profile) -> Table:
    table = _table("", "forward ms", "backward ms", "update ms", "share", "GFLOP", "GFLOP/s")
    recorded = profile.recording.operators
    total = profile.data_seconds + profile.unattributed_seconds + sum(operator.seconds for operator in recorded)
    table.add_row("data", "", "", _ms(profile.data_seconds), _share(profile.data_seconds, total), "", "")
    for part in (*PARTS, "communication"):
        own = [operator for operator in recorded if operator.part == part]
        by_phase = _seconds_by(own, lambda operator: operator.phase)
        table.add_row(
            part,
            *(_ms(by_phase.get(phase)) for phase in ("forward", "backward", "update")),
            _share(sum(by_phase.values()), total),
            *_rate(own),
        )
    table.add_row(
        "outside operators",
        "",
        "",
        _ms(profile.unattributed_seconds),
        _share(profile.unattributed_seconds, total),
        "",
        "",
    )
    return table


def _operators_table(title: str, operators: list[Operator]) -> Table:
    table = _table(title, "calls", "forward ms", "backward ms", "share", "GFLOP/s", "GB/s")
    total = sum(operator.seconds for operator in operators)
    kinds = _seconds_by(operators, lambda operator: operator.kind)
    for kind in sorted(kinds, key=lambda kind: (kind == OTHER, -kinds[kind])):
        own = [operator for operator in operators if operator.kind == kind]
        phases = _seconds_by(own, lambda operator: operator.phase)
        moved = sum(operator.bytes * operator.calls for operator in own)
        table.add_row(
            kind,
            str(sum(operator.calls for operator in own)),
            _ms(phases.get("forward")),
            _ms(phases.get("backward")),
            _share(kinds[kind], total),
            _rate(own)[1],
            f"{moved / kinds[kind] / 1e9:.1f}" if kinds[kind] else "",
        )
    return table


def _memory_table(profile: Profile) -> Table:
    table = _table("memory", "MiB", "of its own at most")
    recording = profile.recording
    for kind, size in recording.held_bytes.items():
        table.add_row(kind, _mib(size), "")
    for part in (*PARTS, GRADIENTS):
        at_peak = sum(size for (own, _), size in recording.at_peak.items() if own == part)
        table.add_row(f"{part}, at the peak", _mib(at_peak), _mib(recording.peak_of.get(part, 0)))
    table.add_section()
    table.add_row("peak", _mib(sum(recording.held_bytes.values()) + recording.peak_bytes), "")
    return table


def _table(title: str, *columns: str) -> Table:
    return plain_table((title, "left"), *((column, "right") for column in columns))


def _seconds_by(operators: Iterable[Operator], key: Callable[[Operator], str]) -> dict[str, float]:
    seconds: dict[str, float] = defaultdict(float)
    for operator in operators:
        seconds[key(operator)] += operator.seconds
    return dict(seconds)


def _rate(operators: Iterable[Operator]) -> tuple[str, str]:
    """GFLOP, and GFLOP/s over the operators that count any."""
    counting = [operator for operator in operators if operator.flops]
    flops = sum(operator.flops * operator.calls for operator in counting)
    seconds = sum(operator.seconds for operator in counting)
    return (f"{flops / 1e9:.2f}", f"{flops / seconds / 1e9:.1f}" if seconds else "") if flops else ("", "")


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.1f}"


def _share(seconds: float, total: float) -> str:
    return f"{100 * seconds / total:.1f}%" if total else ""


def _mib(size: int) -> str:
    return f"{size / MIB:.1f}"


def as_json(profile: Profile) -> dict[str, Any]:
    """All figures; times in seconds, memory in bytes."""
    recording = profile.recording
    return {
        "workload": profile.workload,
        "size": profile.size,
        "precision": profile.precision,
        "device": profile.device,
        "threads": profile.threads,
        "steps": profile.steps,
        "counts": asdict(profile.counts),
        "step_seconds": profile.step_seconds,
        "data_seconds": profile.data_seconds,
        "unattributed_seconds": profile.unattributed_seconds,
        "host_synchronisations": profile.synchronisations,
        "held_bytes": recording.held_bytes,
        "peak_bytes_beyond_held": recording.peak_bytes,
        "at_peak_bytes": {f"{part} {phase}": size for (part, phase), size in recording.at_peak.items()},
        "trace": None if profile.trace is None else str(profile.trace),
        "operators": [asdict(operator) for operator in recording.operators],
    }
