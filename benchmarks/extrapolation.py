"""From cases of some of a model's layers to all of them: where a whole model does not fit one device.

What a layer costs is the same in each, and what is outside of them does not depend on their number, so time lies on a
straight line over it. Two counts give the line. The result is never measured, and everything that shows it says so.
Peak memory is not extrapolated: with more layers the peak may be at another moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import Result
from benchmarks.timing import Times

NOT_MEASURED = "extrapolated, not measured"


@dataclass(frozen=True)
class Line:
    """Time of one contender over the count, in microseconds, at the count of the whole. `least` and `most`: with the
    tenth and ninetieth percentiles of both measurements where they move the end furthest."""

    median_us: float
    least_us: float
    most_us: float
    each_us: float


@dataclass(frozen=True)
class Extrapolated:
    """A case at the `whole` of its unit, from measurements of two parts."""

    operator: str
    label: str
    device: str
    unit: str
    counts: tuple[int, int]
    whole: int
    samples: int
    lines: dict[str, Line]  # by contender, ours first

    @property
    def how(self) -> str:
        a, b = self.counts
        return f"{NOT_MEASURED}: to {self.whole} {self.unit} on the straight line through {a} and {b}"

    def seconds_per_sample(self, contender: str) -> float:
        return self.lines[contender].median_us / 1e6 / self.samples

    def times_as_fast_as(self, contender: str) -> float:
        ours = next(iter(self.lines.values()))
        return self.lines[contender].median_us / ours.median_us

    def record(self) -> dict[str, Any]:
        return {
            "operator": self.operator,
            "case": self.label,
            "device": self.device,
            "how": self.how,
            "unit": self.unit,
            "counts": list(self.counts),
            "whole": self.whole,
            "contenders": {
                name: {
                    "median_us": round(line.median_us, 2),
                    "least_and_most_us": [round(line.least_us, 2), round(line.most_us, 2)],
                    "each_us": round(line.each_us, 2),
                    **({"seconds_per_sample": round(self.seconds_per_sample(name), 6)} if self.samples else {}),
                }
                for name, line in self.lines.items()
            },
        }


def extrapolations(results: Sequence[Result]) -> list[Extrapolated]:
    """Of cases that differ only in how much of the whole they have; from the least and the greatest count.

    A contender whose time does not grow with the count is left out: that is noise, no line.
    """
    groups: dict[tuple[str, str, str], dict[int, Result]] = {}
    for result in results:
        case = result.case
        if case.part is not None:
            key = case.operator, case.label.replace(case.part.note, ""), case.device
            groups.setdefault(key, {})[case.part.held] = result
    found = []
    for (operator, label, device), by_count in groups.items():
        counts = few, many = min(by_count), max(by_count)
        case = by_count[few].case
        if few == many or case.part is None:
            continue
        at_few, at_many = ({t.contender: t.times for t in by_count[count].timings} for count in counts)
        whole = case.part.whole
        lines = {name: _line(few, many, whole, at_few[name], at_many[name]) for name in at_few if name in at_many}
        lines = {name: line for name, line in lines.items() if line.each_us > 0}
        if next(iter(at_few)) in lines:  # without ours there is nothing to compare
            found.append(Extrapolated(operator, label, device, case.part.unit, counts, whole, case.samples, lines))
    return found


def _line(few: int, many: int, whole: int, at_few: Times, at_many: Times) -> Line:
    def end(first: Callable[[Times], float], second: Callable[[Times], float]) -> float:
        each = (second(at_many) - first(at_few)) / (many - few)
        return first(at_few) + each * (whole - few)

    each = (at_many.median - at_few.median) / (many - few)
    median = end(lambda t: t.median, lambda t: t.median)
    return Line(median, end(lambda t: t.high, lambda t: t.low), end(lambda t: t.low, lambda t: t.high), each)
