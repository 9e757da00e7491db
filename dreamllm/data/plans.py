"""What a batch will hold and where a loader stands, as a few integers.

A step of training consumes `of` batches, one per lane. The lanes belong to the run, not to its processes: a process
runs some of them, so the documents of a step do not depend on how many processes share it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LaneState:
    """Where a lane stands.

    - `step`: how many batches it has made. With a fixed number of documents per batch this is all.
    - `position`: the next position of the mixture's order that the lane reads; None where it follows from `step`.
    - `held`: positions that were read but not packed yet, oldest first.
    """

    step: int = 0
    position: int | None = None
    held: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        if self.position is None:
            return {"step": self.step}
        return {"step": self.step, "position": self.position, "held": list(self.held)}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> LaneState:
        return LaneState(values["step"], values.get("position"), tuple(values.get("held", ())))


@dataclass(frozen=True)
class BatchPlan:
    """One batch to be made: the documents at `positions` of the mixture's order, for lane `lane`.

    `number` counts the batches of all lanes: step * lanes + lane. `state` is the lane's after this batch.
    """

    number: int
    lane: int
    positions: tuple[int, ...]
    state: LaneState


@dataclass(frozen=True)
class LoaderState:
    """The states of a run's lanes, or of those that one process runs, all before the same step.

    It does not know of processes and workers: a run continues exactly with any number of them.
    """

    lanes: dict[int, LaneState]

    @staticmethod
    def initial(lanes: int) -> LoaderState:
        """The beginning of a run with `lanes` lanes."""
        return LoaderState({lane: LaneState() for lane in range(lanes)})

    @staticmethod
    def merge(states: Iterable[LoaderState]) -> LoaderState:
        """The whole state from those of all processes. Raises `ValueError` when two hold the same lane."""
        lanes: dict[int, LaneState] = {}
        for state in states:
            twice = lanes.keys() & state.lanes.keys()
            if twice:
                raise ValueError(f"lanes {sorted(twice)} are in the states of two processes")
            lanes.update(state.lanes)
        return LoaderState(dict(sorted(lanes.items())))

    def after(self, plans: Iterable[BatchPlan]) -> LoaderState:
        """This state once the batches of `plans` have been consumed."""
        return LoaderState({**self.lanes, **{plan.lane: plan.state for plan in plans}})

    def of(self, lanes: range) -> LoaderState:
        """The part of some lanes. Raises `ValueError` when one is not there."""
        missing = [lane for lane in lanes if lane not in self.lanes]
        if missing:
            raise ValueError(f"the state holds the lanes {_listed(self.lanes)}, not {_listed(missing)}")
        return LoaderState({lane: self.lanes[lane] for lane in lanes})

    @property
    def step(self) -> int:
        """The step before which all lanes stand. Raises `ValueError` when they stand before different ones."""
        steps = {state.step for state in self.lanes.values()}
        if len(steps) != 1:
            raise ValueError(f"the lanes stand before different steps: {sorted(steps)}")
        return steps.pop()

    def to_json(self) -> dict[str, Any]:
        """JSON values that `from_json` reads."""
        return {str(lane): state.to_json() for lane, state in self.lanes.items()}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> LoaderState:
        return LoaderState({int(lane): LaneState.from_json(state) for lane, state in values.items()})


def _listed(lanes: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(lanes))) or "none"
