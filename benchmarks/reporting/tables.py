"""The report's tables as text, the same for Markdown and HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.reporting.records import Measured, Record, RecordedCase, geometric_mean

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
    return Table(["ours, times as fast as", "cases", "geometric mean", "least", "greatest"], rows)


def operator_table(cases: Sequence[RecordedCase]) -> Table:
    """Of every contender the least time, or the time per sample where cases count samples; in brackets how many times
    as fast ours is. Peers that were timed nowhere are in `absent_peers`; columns without a figure are left out."""
    peers = [peer for peer in peers_of(cases) if any(peer in case.peers for case in cases)]
    ours = cases[0].ours
    mixed = len({case.caches for case in cases}) > 1
    unit = "ms per sample" if _counts_samples(cases) else "us"
    columns: dict[str, list[str]] = {
        "case": [f"{case.label}, {case.caches or 'unknown'} caches" if mixed else case.label for case in cases],
        f"{ours}, {unit}": [_time_cell(case, ours) for case in cases],
    }
    if _counts_samples(cases):
        columns["samples per second"] = [_samples_per_second(case.contenders[ours]) for case in cases]
    columns["median over minimum"] = [
        f"+{100 * (case.contenders[ours].median_us / case.contenders[ours].minimum_us - 1):.0f}%" for case in cases
    ]
    columns |= {f"{peer}, {unit}": [_peer_cell(case, peer) for case in cases] for peer in peers}
    columns["of copy bandwidth"] = [_share_cell(case) for case in cases]
    columns["GFLOP/s"] = [_gflops_cell(case) for case in cases]
    columns |= {f"memory of {name}, MB": [_memory_cell(case, name) for case in cases] for name in (ours, *peers)}
    kept = {name: cells for name, cells in columns.items() if any(cell != NOTHING for cell in cells)}
    return Table(list(kept), list(zip(*kept.values(), strict=True)))


def extrapolated_table(record: Record) -> Table:
    """What the run extrapolated, and from what: per sample, or per call where cases count none."""
    rows = []
    for case in record.extrapolations:
        ours, (few, many) = next(iter(case["contenders"].values())), case["counts"]
        for name, values in case["contenders"].items():
            seconds = values.get("seconds_per_sample", values["median_us"] / 1e6)
            least, most = (seconds * us / values["median_us"] for us in values["least_and_most_us"])
            ratio = NOTHING if values is ours else times(values["median_us"] / ours["median_us"])
            cells = f"{1e3 * seconds:,.1f}", f"{1e3 * least:,.1f} to {1e3 * most:,.1f}", ratio
            measured = f"{few} and {many} of {case['whole']} {case['unit']}"
            rows.append([f"{case['operator']}, {name}: {case['case']}", measured, *cells])
    return Table(
        ["extrapolated, not measured", "measured with", "ms per sample", "from ... to", "ours, times as fast"], rows
    )


def absent_peers(cases: Sequence[RecordedCase]) -> list[str]:
    """A sentence for each peer that was timed in no case, with its reasons."""
    sentences = []
    for peer in peers_of(cases):
        if not any(peer in case.peers for case in cases):
            reasons = dict.fromkeys(case.failures[peer] for case in cases if peer in case.failures)
            sentences.append(f"{peer}: {'; '.join(reasons)}.")
    return sentences


def _counts_samples(cases: Sequence[RecordedCase]) -> bool:
    return all(measured.seconds_per_sample for case in cases for measured in case.contenders.values())


def _time_cell(case: RecordedCase, contender: str) -> str:
    measured = case.contenders[contender]
    if seconds := measured.least_seconds_per_sample:
        return f"{1e3 * seconds:,.1f}"
    return microseconds(measured.minimum_us)


def _samples_per_second(measured: Measured) -> str:
    seconds = measured.least_seconds_per_sample
    return f"{1 / seconds:,.2f}" if seconds else NOTHING


def _peer_cell(case: RecordedCase, peer: str) -> str:
    if peer in case.peers:
        return f"{_time_cell(case, peer)} ({times(case.times_as_fast_as(peer))})"
    return f"not timed: {case.failures[peer]}" if peer in case.failures else NOTHING


def _share_cell(case: RecordedCase) -> str:
    share = case.share_of_copy_bandwidth(case.ours) if case.bytes_moved else None
    return NOTHING if share is None else f"{100 * share:.0f}%"


def _gflops_cell(case: RecordedCase) -> str:
    gflops = case.gflops(case.ours)
    return NOTHING if gflops is None else f"{gflops:,.3g}" if gflops < 1000 else f"{gflops:,.0f}"


def _memory_cell(case: RecordedCase, contender: str) -> str:
    held = case.contenders[contender].peak_extra_bytes if contender in case.contenders else None
    return NOTHING if held is None else f"{held / 1e6:,.1f}"


def boundary_table(rows: dict[str, float]) -> Table:
    return Table(["one call on a tiny tensor", "us"], [[name, f"{value:.1f}"] for name, value in rows.items()])
