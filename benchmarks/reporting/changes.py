"""Two records side by side, and a record held against one or more of a baseline.

How much two times must differ to mean something follows from the records. The spread s = ln(median / minimum) of a
measurement says how far a usual round lies above the best one; spreads of independent measurements add in quadrature.

    compare  one contender's times A and B:    noise = sqrt(s_A^2 + s_B^2)
             slower if ln(B / A) > max(noise, ln 1.05), faster if ln(A / B) is, within noise otherwise
    gate     the ratio ours / peer, in the baseline and in the record: worse if ln(ratio / ratio of the baseline) >
             max(noise, ln 1.05), noise from all four spreads, and that against every peer which both have

Times are minima. Contenders of a run take turns, so a slow machine changes both sides of the gate's ratio. Yet two runs
of one commit differ by more than their spreads tell: memory lies elsewhere, and a shared machine slows down one more
than the other. How much, only several runs of the baseline tell. With k of them

    ratio of the baseline  the geometric mean of theirs
    sigma of an operator   the deviation of its cases' ln ratio between the runs, pooled over the cases, or the usual
                           deviation of all cases (1.48 times the median) where that is more
    noise of a case        sqrt(spreads^2 + 9 sigma^2 (1 + 1/k)): three standard deviations
    as a whole             the mean of ln(ratio / ratio of the baseline) over operators, the peer being eager, the
                           original's pattern, or a case's first, may not exceed
                           max(3 sqrt(sum of sigma^2 (1 + 1/k)) / operators, ln 1.05): a slowdown that is too small to
                           be seen in any one operator is seen in all of them together
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True)
class Baseline:
    """Ours over the reference in one case, in every run of the baseline that has it."""

    case: RecordedCase
    reference: str
    logarithms: list[float]
    squared_spread: float  # of their mean

    @property
    def mean(self) -> float:
        return statistics.fmean(self.logarithms)

    @property
    def deviations(self) -> list[float]:
        return [value - self.mean for value in self.logarithms]


def _baselines_of(runs: Sequence[RecordedCase], peers: Sequence[str]) -> list[Baseline]:
    """One for each peer that all runs and `peers` have, the usual reference first."""
    first = runs[0]
    candidates = dict.fromkeys(peer for peer in (first.reference, *first.peers) if peer in peers)
    return [_baseline(runs, str(peer)) for peer in candidates if all(peer in run.peers for run in runs)]


def _baseline(runs: Sequence[RecordedCase], reference: str) -> Baseline:
    pairs = [(run.contenders[run.ours], run.contenders[reference]) for run in runs]
    spread = sum(ours.spread**2 + peer.spread**2 for ours, peer in pairs) / len(pairs) ** 2
    return Baseline(runs[0], reference, [math.log(o.minimum_us / p.minimum_us) for o, p in pairs], spread)


def deviations_between_runs(found: Sequence[Baseline]) -> dict[str, float]:
    """Sigma by operator, from the cases that several runs have; empty where none has."""
    several = [baseline for baseline in found if len(baseline.logarithms) > 1]
    if not several:
        return {}
    scaled = []
    pooled: dict[str, list[tuple[float, int]]] = {}
    for baseline in several:
        count = len(baseline.logarithms)
        scaled += [abs(d) * math.sqrt(count / (count - 1)) for d in baseline.deviations]
        squares = sum(d**2 for d in baseline.deviations)
        pooled.setdefault(baseline.case.operator, []).append((squares, count - 1))
    usual = 1.4826 * statistics.median(scaled)
    return {
        operator: max(usual, math.sqrt(sum(s for s, _ in rows) / sum(n for _, n in rows)))
        for operator, rows in pooled.items()
    }


@dataclass(frozen=True)
class Comparison:
    """A record beside the runs of a baseline."""

    changes: list[list[Change]]  # of each case against every peer in common, the usual reference first
    alone: list[RecordedCase]  # cases without a peer in common
    sigmas: dict[str, float]

    @property
    def agreed(self) -> list[Change]:
        """Of each case the change that is nearest to none: where ours changed, it did against every peer."""
        return [min(several, key=lambda change: abs(math.log(change.ratio)) / change.noise) for several in self.changes]


def ratio_changes(baselines: Sequence[Record], record: Record) -> Comparison:
    """Ours over its peers."""
    now = {case.key: case for case in record.cases}
    found, alone = [], []
    for case in baselines[0].cases:
        if case.key not in now:
            continue
        runs = [other for run in baselines for other in run.cases if other.key == case.key]
        several = _baselines_of(runs, now[case.key].peers)
        if several:
            found.append(several)
        else:
            alone.append(case)
    sigmas = deviations_between_runs([several[0] for several in found])
    changes = [[_change(baseline, now[baseline.case.key], sigmas) for baseline in several] for several in found]
    return Comparison(changes, alone, sigmas)


def _change(baseline: Baseline, after: RecordedCase, sigmas: Mapping[str, float]) -> Change:
    ours, peer = after.contenders[after.ours], after.contenders[baseline.reference]
    between = 9 * sigmas.get(baseline.case.operator, 0.0) ** 2 * (1 + 1 / len(baseline.logarithms))
    within = baseline.squared_spread + ours.spread**2 + peer.spread**2
    return Change(
        baseline.case,
        baseline.case.ours,
        math.exp(baseline.mean),
        ours.minimum_us / peer.minimum_us,
        noise=max(LEAST_NOISE, math.sqrt(within + between)),
        reference=baseline.reference,
    )


def change_as_a_whole(compared: Comparison, runs: int) -> tuple[float, float] | None:
    """The mean change over operators and its bound, as logarithms. None with one run of the baseline."""
    operators: dict[str, list[float]] = {}
    for usual, *_ in compared.changes:
        operators.setdefault(usual.case.operator, []).append(math.log(usual.ratio))
    if not compared.sigmas or not operators:
        return None
    mean = statistics.fmean(statistics.fmean(values) for values in operators.values())
    variance = sum(compared.sigmas.get(operator, 0.0) ** 2 for operator in operators) * (1 + 1 / runs)
    return mean, max(LEAST_NOISE, 3 * math.sqrt(variance) / len(operators))


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


def gate(record: Record, *baselines: Record) -> tuple[bool, str]:
    """Whether the record passes, and the text that says why.

    It fails where a ratio became worse, or all of them together, where the record lacks a case of an operator that it
    measured, and where nothing could be compared. Operators that the record did not measure at all are named only.
    Raises ValueError where the records were measured under different conditions.
    """
    for baseline in baselines:
        different = different_conditions(baseline, record)
        if different:
            raise ValueError("the records cannot be held against each other: " + "; ".join(different))
    compared = ratio_changes(baselines, record)
    changes = compared.agreed
    worse = [change for change in changes if change.verdict == SLOWER]
    missing = missing_cases(baselines[0], record)
    lost = [case for case in missing if case.operator in record.operators]
    lines = [f"worse: {change}" for change in sorted(worse, key=lambda change: -change.ratio)]
    lines += [f"missing: {case.name}" for case in lost]
    lines += [f"no peer in common: {case.name}" for case in compared.alone]
    unmeasured = sorted({case.operator for case in missing} - set(record.operators))
    if unmeasured:
        lines.append(f"not measured: {', '.join(unmeasured)}")
    whole = change_as_a_whole(compared, len(baselines))
    worse_as_a_whole = whole is not None and whole[0] > whole[1]
    if changes:
        lines += _counted(changes, len(worse))
        if whole is None:
            lines.append("one run of the baseline: how much runs of one commit differ is not in the bounds")
        else:
            lines.append(
                f"{'worse ' if worse_as_a_whole else ''}as a whole: {math.exp(whole[0]):.2f}x, "
                f"bound {math.exp(whole[1]):.2f}x"
            )
    else:
        lines.append("no ratio could be compared")
    passed = bool(changes) and not worse and not lost and not worse_as_a_whole
    lines.append("passed" if passed else "FAILED")
    return passed, "\n".join(lines)


def _counted(changes: Sequence[Change], worse: int) -> list[str]:
    better = sum(change.verdict == FASTER for change in changes)
    widest = max(changes, key=lambda change: change.noise)
    lines = [
        f"{len(changes)} ratios: {worse} worse, {better} better, {len(changes) - worse - better} within noise; "
        f"widest bound {math.exp(widest.noise):.2f}x ({widest.case.name})"
    ]
    if blind := sum(change.noise > WIDE for change in changes):
        lines.append(f"{blind} bounds are wider than {math.exp(WIDE):.1f}x: measure longer or on a quieter machine")
    return lines
