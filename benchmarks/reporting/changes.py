"""Two records side by side, and a record held against a baseline.

How much two times must differ to mean something follows from the records. The spread s = ln(median / minimum) of a
measurement says how far a usual round lies above the best one; spreads of independent measurements add in quadrature.

    compare  one contender's times A and B:    noise = sqrt(s_A^2 + s_B^2)
             slower if ln(B / A) > max(noise, ln 1.05), faster if ln(A / B) is, within noise otherwise
    gate     the ratio ours / reference, in the baseline and in the record, where reference is eager (or a case's first
             peer): worse if ln(ratio / ratio of the baseline) > max(noise, ln 1.05), noise from all four spreads

Times are minima. Contenders of a run take turns, so a slow machine changes both sides of the gate's ratio.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from benchmarks.reporting.records import CONDITIONS, Measured, Record, RecordedCase

LEAST_NOISE = math.log(1.05)
WIDE = math.log(1.5)  # a gate this noisy misses what it is for, and says so
FASTER, SLOWER, WITHIN = "faster", "slower", "within noise"


def noise(*measurements: Measured) -> float:
    """As a natural logarithm."""
    return max(LEAST_NOISE, math.sqrt(sum(measured.spread**2 for measured in measurements)))


@dataclass(frozen=True)
class Change:
    """A contender of a case in A and in B, or with `reference` ours over it in the baseline and in the record."""

    case: RecordedCase
    contender: str
    before: float
    after: float
    noise: float
    reference: str | None = None

    @property
    def ratio(self) -> float:
        return self.after / self.before

    @property
    def verdict(self) -> str:
        if abs(math.log(self.ratio)) <= self.noise:
            return WITHIN
        return SLOWER if self.ratio > 1 else FASTER

    def __str__(self) -> str:
        return (
            f"{self.case.name}: {self.contender} / {self.reference} was {self.before:.3f}, is {self.after:.3f}: "
            f"{self.ratio:.2f}x, bound {math.exp(self.noise):.2f}x"
        )


def different_conditions(a: Record, b: Record) -> list[str]:
    first, second = a.conditions(), b.conditions()
    return [
        f"{name}: {first[name]} and {second[name]}"
        for name in CONDITIONS
        if None not in (first[name], second[name]) and first[name] != second[name]
    ]


def missing_cases(wanted: Record, found: Record) -> list[RecordedCase]:
    keys = {case.key for case in found.cases}
    return [case for case in wanted.cases if case.key not in keys]


def _pairs(a: Record, b: Record) -> list[tuple[RecordedCase, RecordedCase]]:
    others = {case.key: case for case in b.cases}
    return [(case, others[case.key]) for case in a.cases if case.key in others]


def time_changes(a: Record, b: Record) -> list[Change]:
    """Every contender that both records have of a case."""
    changes = []
    for before, after in _pairs(a, b):
        for contender in before.contenders:
            if contender in after.contenders:
                first, second = before.contenders[contender], after.contenders[contender]
                changes.append(Change(before, contender, first.minimum_us, second.minimum_us, noise(first, second)))
    return changes


def ratio_changes(baseline: Record, record: Record) -> tuple[list[Change], list[RecordedCase]]:
    """Ours over the reference, and the cases that have no peer in common."""
    changes, alone = [], []
    for before, after in _pairs(baseline, record):
        shared = [peer for peer in (before.reference, *before.peers) if peer in after.peers]
        if not shared:
            alone.append(before)
            continue
        reference = str(shared[0])
        old, new = before.contenders, after.contenders
        four = (old[before.ours], old[reference], new[after.ours], new[reference])
        ratios = [ours.minimum_us / peer.minimum_us for ours, peer in (four[:2], four[2:])]
        changes.append(Change(before, before.ours, *ratios, noise=noise(*four), reference=reference))
    return changes, alone


def compare_text(a: Record, b: Record) -> str:
    """A table of B / A, what the peers say about the machine, and what only one of the two has."""
    changes = time_changes(a, b)
    lines = [f"A = {a.name} (commit {a.facts.get('commit', 'not recorded')}), "
             f"B = {b.name} (commit {b.facts.get('commit', 'not recorded')})"]  # fmt: skip
    different = different_conditions(a, b)
    lines += [f"  measured differently, so times say little about the code: {line}" for line in different]
    if changes:
        width = max(len(change.case.name) for change in changes)
        names = max(9, *(len(change.contender) for change in changes))
        lines.append(
            f"\n{'':{width}}  {'contender':{names}} {'A us':>11} {'B us':>11} {'B/A':>7} {'noise':>7}  verdict"
        )
        lines += [
            f"{change.case.name:{width}}  {change.contender:{names}} {change.before:11.1f} {change.after:11.1f} "
            f"{change.ratio:6.2f}x {math.exp(change.noise):6.2f}x  {change.verdict}"
            for change in changes
        ]
        lines.append("")
        lines += _counts("ours", [change for change in changes if change.contender == change.case.ours])
        lines += _counts("peers", [change for change in changes if change.contender != change.case.ours])
        lines.append("peers that changed alike tell of the machine or of PyTorch; `gate` compares ratios within a run")
    else:
        lines.append("no case is in both records")
    for only, other, title in ((a, b, "A"), (b, a, "B")):
        lines += [f"only in {title}: {case.name}" for case in missing_cases(only, other)]
    return "\n".join(lines)


def _counts(title: str, changes: list[Change]) -> list[str]:
    if not changes:
        return []
    verdicts = [change.verdict for change in changes]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in (FASTER, SLOWER, WITHIN))
    return [f"{title:5}: {counts}; median B/A {statistics.median(change.ratio for change in changes):.2f}x"]


def gate(record: Record, baseline: Record) -> tuple[bool, str]:
    """Whether the record passes, and the text that says why.

    It fails where a ratio became worse, where the record lacks a case of an operator that it measured, and where
    nothing could be compared. Operators that the record did not measure at all are named only. Raises ValueError where
    the two were measured under different conditions.
    """
    different = different_conditions(baseline, record)
    if different:
        raise ValueError("the two records cannot be held against each other: " + "; ".join(different))
    changes, alone = ratio_changes(baseline, record)
    worse = [change for change in changes if change.verdict == SLOWER]
    missing = missing_cases(baseline, record)
    lost = [case for case in missing if case.operator in record.operators]
    lines = [f"worse: {change}" for change in sorted(worse, key=lambda change: -change.ratio)]
    lines += [f"missing: {case.name}" for case in lost]
    lines += [f"no peer in common: {case.name}" for case in alone]
    unmeasured = sorted({case.operator for case in missing} - set(record.operators))
    if unmeasured:
        lines.append(f"not measured: {', '.join(unmeasured)}")
    if changes:
        better = sum(change.verdict == FASTER for change in changes)
        widest = max(changes, key=lambda change: change.noise)
        lines.append(f"{len(changes)} ratios: {len(worse)} worse, {better} better, "
                     f"{len(changes) - len(worse) - better} within noise; "
                     f"widest bound {math.exp(widest.noise):.2f}x ({widest.case.name})")  # fmt: skip
        blind = sum(change.noise > WIDE for change in changes)
        if blind:
            lines.append(f"{blind} bounds are wider than {math.exp(WIDE):.1f}x: measure longer or on a quieter machine")
    else:
        lines.append("no ratio could be compared")
    passed = bool(changes) and not worse and not lost
    lines.append("passed" if passed else "FAILED")
    return passed, "\n".join(lines)
