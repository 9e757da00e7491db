"""The report's tables as text, the same for Markdown and HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.reporting.records import Record, RecordedCase, geometric_mean

NOTHING = "-"


@dataclass(frozen=True)
class Table:
    """The first column is text, the others are figures."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        return "\n".join("| " + " | ".join(map(markdown_text, line)) + " |" for line in lines)


def markdown_text(text: str) -> str:
    """On one line, in a table's cell or outside, with nothing that Markdown or HTML would take as a sign of theirs."""
    text = " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())
    for sign in "\\|*_`[]":
        text = text.replace(sign, f"\\{sign}")
    return text


def microseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 10_000 else f"{value:,.1f}"


def times(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio >= 10 else f"{ratio:.2f}x"


def peers_of(cases: Sequence[RecordedCase]) -> list[str]:
    return list(dict.fromkeys(peer for case in cases for peer in (*case.peers, *case.failures)))


def summary(record: Record) -> Table:
    """By operator and peer: the geometric mean, the least and the greatest of how many times as fast ours is."""
    rows = []
    for operator, cases in record.operators.items():
        for peer in peers_of(cases):
            ratios = [case.times_as_fast_as(peer) for case in cases if peer in case.peers]
            if ratios:
                figures = (geometric_mean(ratios), min(ratios), max(ratios))
                rows.append([f"{operator}, {peer}", str(len(ratios)), *map(times, figures)])
    return Table(["times as fast as", "cases", "geometric mean", "least", "greatest"], rows)


def operator_table(cases: Sequence[RecordedCase]) -> Table:
    """Minimum microseconds of every contender, in brackets how many times as fast ours is."""
    peers = peers_of(cases)
    ours = cases[0].ours
    mixed = len({case.caches for case in cases}) > 1
    memory = any(measured.peak_extra_bytes is not None for case in cases for measured in case.contenders.values())
    header = ["case", f"{ours}, us", "median over minimum", *(f"{peer}, us" for peer in peers), "of copy bandwidth",
              "GFLOP/s", *(["memory, MB"] if memory else [])]  # fmt: skip
    rows = []
    for case in cases:
        measured = case.contenders[case.ours]
        share, gflops = case.share_of_copy_bandwidth(case.ours), case.gflops(case.ours)
        rows.append(
            [
                f"{case.label}, {case.caches or 'unknown'} caches" if mixed else case.label,
                microseconds(measured.minimum_us),
                f"+{100 * (measured.median_us / measured.minimum_us - 1):.0f}%",
                *(_peer_cell(case, peer) for peer in peers),
                NOTHING if share is None else f"{100 * share:.0f}%",
                NOTHING if gflops is None else f"{gflops:,.3g}" if gflops < 1000 else f"{gflops:,.0f}",
                *([_memory_cell(case)] if memory else []),
            ]
        )
    return Table(header, rows)


def _peer_cell(case: RecordedCase, peer: str) -> str:
    if peer in case.peers:
        return f"{microseconds(case.contenders[peer].minimum_us)} ({times(case.times_as_fast_as(peer))})"
    return f"failed: {case.failures[peer]}" if peer in case.failures else NOTHING


def _memory_cell(case: RecordedCase) -> str:
    held = case.contenders[case.ours].peak_extra_bytes
    reference = case.contenders[case.reference].peak_extra_bytes if case.reference else None
    if held is None:
        return NOTHING
    beside = f" ({case.reference}: {reference / 1e6:,.1f})" if reference is not None else ""
    return f"{held / 1e6:,.1f}{beside}"


def boundary_table(rows: dict[str, float]) -> Table:
    return Table(["one call on a tiny tensor", "us"], [[name, f"{value:.1f}"] for name, value in rows.items()])
