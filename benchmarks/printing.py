"""A run's results for the terminal: one block per case as it ends, one coloured table at the end."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TextIO

from benchmarks.extrapolation import Extrapolated
from benchmarks.harness import Result

FASTER, SLOWER = 1.05, 1 / 1.05  # beyond these a ratio gets a colour
_CODES = {"green": "32", "red": "31", "yellow": "33", "bold": "1"}


def coloured(text: str, colour: str, stream: TextIO | None = None) -> str:
    """The text, with colour where the stream is a terminal and NO_COLOR is not set."""
    stream = stream or sys.stdout
    if not colour or not stream.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\033[{_CODES[colour]}m{text}\033[0m"


def print_result(result: Result) -> None:
    ours = next(iter(result.case.contenders))
    print(f"\n{coloured(result.case.operator, 'bold')}  {result.case.label}")
    width = max(16, *map(len, result.case.contenders), *map(len, result.case.peers))
    bandwidth = result.case.bytes_moved > 0  # the share says nothing of a loop that no copy is like
    title = "of copy bandwidth" if bandwidth else ""
    print(f"  {'':{width}} {'min us':>11} {'median us':>11} {title:>18}   {ours} is")
    for timing in result.timings:
        ratio = timing.minimum_us / result.minimum(ours)
        faster = "" if timing.contender == ours else f"{ratio:.2f}x as fast"
        share = f"{100 * result.share_of_copy_bandwidth(timing.contender):.0f}%" if bandwidth else ""
        memory = result.peak_extra_bytes.get(timing.contender)
        held = "" if memory is None else f"   holds {memory / 1e6:.1f} MB more"
        if result.case.samples:
            held += f"   {result.seconds_per_sample(timing.contender):.4g} s per sample"
        times = f"{timing.minimum_us:11.1f} {timing.median_us:11.1f}"
        print(f"  {timing.contender:{width}} {times} {share:>18}   {coloured(faster, _colour(ratio))}{held}")
    for contender, reason in result.failures.items():
        print(f"  {contender:{width}} {coloured('not timed:', 'yellow')} {reason}")
    if bandwidth:
        print(f"  {'copy':{width}} {result.copy_minimum_us:11.1f}")
    sys.stdout.flush()


def _colour(ratio: float) -> str:
    return "green" if ratio >= FASTER else "red" if ratio <= SLOWER else ""


def print_summary(results: Sequence[Result]) -> None:
    """One line per case: how many times as fast as each contender ours is, and its share of that one's memory."""
    width = max(len(f"{r.case.operator} {r.case.label}") for r in results)
    print("\n" + coloured(f"{'':{width}}  {'ours us':>12}  how many times as fast ours is as each", "bold"))
    for result in results:
        ours = result.timings[0]
        parts = []
        for timing in result.timings[1:]:
            ratio = timing.minimum_us / ours.minimum_us
            text = f"{timing.contender} {coloured(f'{ratio:.2f}x', _colour(ratio))}"
            if timing.contender in result.peak_extra_bytes:
                held = result.peak_extra_bytes[ours.contender] / max(1, result.peak_extra_bytes[timing.contender])
                text += f" ({held:.2f} of its memory)"
            parts.append(text)
        name = f"{result.case.operator} {result.case.label}"
        print(f"{name:{width}}  {ours.minimum_us:12,.1f}  {', '.join(parts)}")


def print_extrapolations(found: Sequence[Extrapolated]) -> None:
    """Apart from what was measured, and said to be something else."""
    for case in found:
        print(f"\n{coloured(case.operator, 'bold')}  {case.label}  ({coloured(case.how, 'yellow')})")
        width = max(map(len, case.lines))
        for name, line in case.lines.items():
            ratio = case.times_as_fast_as(name)
            beside = "" if line is next(iter(case.lines.values())) else f"   {ratio:.2f}x"
            spread = f"({line.least_us / 1e3:,.1f} to {line.most_us / 1e3:,.1f})"
            print(f"  {name:{width}} {line.median_us / 1e3:12,.1f} ms {spread}{coloured(beside, _colour(ratio))}")


def print_missing(results: Sequence[Result]) -> None:
    """Why peers were not timed, each reason once."""
    reasons: dict[tuple[str, str], int] = {}
    for result in results:
        for contender, reason in result.failures.items():
            reasons[contender, reason] = reasons.get((contender, reason), 0) + 1
    for (contender, reason), count in reasons.items():
        print(f"{contender}: {reason} ({count} case{'s' if count > 1 else ''})")
