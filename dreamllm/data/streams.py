"""The steps of a run as a torch dataset with a state, for training loops that are not ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from dreamllm.data.loader import Batches, LoadedBatch, load_steps
from dreamllm.data.plans import LoaderState


class StepStream(IterableDataset):
    """`for step in StepStream(...)`: lists of `LoadedBatch`, one per own lane; see `load_steps`.

    It has the `state_dict` and `load_state_dict` that torchdata's `StatefulDataLoader` looks for, and can be wrapped in
    one: `StatefulDataLoader(stream, batch_size=None)`. Nothing is gained by it but its place in other programs: the
    state is exact without it, because batches are functions of their plans, and its own workers, which would each have
    to replay what they had prefetched, are not needed: `workers` makes the batches.
    """

    def __init__(
        self,
        batches: Batches,
        lanes: range,
        of: int,
        workers: int = 0,
        pin_memory: bool = False,
        steps: int | None = None,
    ) -> None:
        self.batches, self.lanes, self.of = batches, lanes, of
        self.workers, self.pin_memory, self.steps = workers, pin_memory, steps
        self.state = LoaderState.initial(of).of(lanes)

    def __iter__(self) -> Iterator[list[LoadedBatch]]:
        """Steps from the state on, up to step `steps`. Raises `RuntimeError` in one of several worker processes."""
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise RuntimeError(
                f"{worker.num_workers} workers would each load every step; give the workers to the StepStream and "
                "num_workers=0 to the loader around it"
            )
        left = None if self.steps is None else max(0, self.steps - self.state.step)
        for step in load_steps(self.batches, self.lanes, self.of, self.state, self.workers, self.pin_memory, left):
            self.state = self.state.after(loaded.plan for loaded in step)
            yield step

    def state_dict(self) -> dict[str, Any]:
        """The state after the last step that was taken, as JSON values."""
        return self.state.to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state, one of all lanes or of the own ones."""
        self.state = LoaderState.from_json(state).of(self.lanes)
