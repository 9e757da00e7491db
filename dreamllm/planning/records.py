"""Measured operators: what `dreamllm profile` found on a device, and what they say about others of their kind."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dreamllm.profiling.profile import Profile
from dreamllm.profiling.recorder import Operator

FARTHEST = 8.0
"""A record of the same operator stands for sizes up to this factor away; beyond it the device's limits are asked."""


@dataclass(frozen=True)
class RecordedOperator:
    """One call with this signature took `seconds`."""

    name: str
    signature: str
    flops: int
    bytes: int
    seconds: float


@dataclass
class Records:
    """Operators measured on `device`.

    `outside`: seconds that pass outside of operators per second inside. Not per operator: what a step leaves over grows
    with its work (measured: nothing in stage I, whose UNet is many small operators, 3 to 18% where layers train).
    """

    device: str
    operators: list[RecordedOperator]
    outside: float

    @cached_property
    def by_signature(self) -> dict[str, float]:
        return {operator.signature: operator.seconds for operator in self.operators}

    @cached_property
    def by_name(self) -> dict[tuple[str, str], list[RecordedOperator]]:
        groups: dict[tuple[str, str], list[RecordedOperator]] = defaultdict(list)
        for operator in self.operators:
            groups[operator.name, _dtype(operator.signature)].append(operator)
        return groups

    def seconds(self, operator: Operator) -> float | None:
        """Of one call: as measured, or scaled from the nearest size of the same operator; None where neither is."""
        exact = self.by_signature.get(operator.signature)
        if exact is not None:
            return exact
        candidates = self.by_name.get((operator.name, _dtype(operator.signature)), [])
        nearest = min(candidates, key=lambda other: _distance(operator, other), default=None)
        if nearest is None or _distance(operator, nearest) > 2 * math.log(FARTHEST):
            return None
        if operator.flops and nearest.flops:
            return nearest.seconds * operator.flops / nearest.flops
        return nearest.seconds * (operator.bytes + 1) / (nearest.bytes + 1)


def _distance(operator: Operator, other: RecordedOperator) -> float:
    """Of sizes, on a logarithmic scale; equal inner dimensions count as nearer."""
    flops = abs(math.log((operator.flops + 1) / (other.flops + 1)))
    size = abs(math.log((operator.bytes + 1) / (other.bytes + 1)))
    return flops + size + _unlike(operator.signature, other.signature)


def _unlike(a: str, b: str) -> float:
    """How many of the numbers in two signatures differ, a little each."""
    first, second = _numbers(a), _numbers(b)
    if len(first) != len(second):
        return 1.0
    return sum(0.3 for x, y in zip(first, second, strict=True) if x != y)


def _numbers(signature: str) -> list[str]:
    return [word for word in signature.replace("[", " ").replace("]", " ").replace(",", " ").split() if word.isdigit()]


def _dtype(signature: str) -> str:
    return signature.partition("(")[2].partition("[")[0]


def load_records(path: Path) -> Records:
    """Reads the profile.json of `dreamllm profile`. Raises `ValueError` when it is not one."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        operators = [Operator(**operator) for operator in values["operators"]]
        return records_from(values["device"], operators, values["unattributed_seconds"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path} is not a profile.json of `dreamllm profile`: {error!r}") from error


def records_of(profile: Profile) -> Records:
    """The operators of a profile that was just measured."""
    return records_from(profile.device, profile.recording.operators, profile.unattributed_seconds)


def records_from(device: str, operators: list[Operator], unattributed: float) -> Records:
    """Of a timed recording; `unattributed` seconds of its step passed outside of the operators."""
    calls: dict[str, int] = defaultdict(int)
    seconds: dict[str, float] = defaultdict(float)
    for op in operators:  # the same call may stand in several parts
        calls[op.signature] += op.calls
        seconds[op.signature] += op.seconds
    recorded = {
        op.signature: RecordedOperator(
            op.name, op.signature, op.flops, op.bytes, seconds[op.signature] / calls[op.signature]
        )
        for op in operators
    }
    return Records(device, list(recorded.values()), unattributed / sum(seconds.values()))
