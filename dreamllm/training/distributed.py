"""The processes of a run: started alone or by torchrun, what they tell each other on the host, and how they end.

A run of one process is not a special case for its callers: every method works, at no cost and without a process group.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dreamllm.training.errors import PeerFailed, ProcessLostError, TrainingInterrupted

T = TypeVar("T")

_FAILURE = "dreamllm/failure"
_PATIENCE_SECONDS = 3.0
"""How long a process whose communication broke waits for another one to say why."""

_PAUSE_SECONDS = 0.1


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    `device` is where this process computes. `group` is the host's process group (gloo), `saving` one of its own for
    checkpoints written in the background; both are None in a run of one process that no launcher started.
    """

    rank: int
    world: int
    device: torch.device
    store: dist.Store | None = None
    group: dist.ProcessGroup | None = None
    saving: dist.ProcessGroup | None = None
    _prepared: list[str] = field(default_factory=list, repr=False, compare=False)

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    @property
    def grouped(self) -> bool:
        """Whether there is a process group."""
        return self.group is not None

    def lanes(self, of: int) -> range:
        """The micro-batches of a step that this process runs, of `of`. Raises `ValueError` when they do not divide."""
        if of % self.world:
            raise ValueError(
                f"{self.world} processes cannot share {of} micro-batches evenly; make micro_batches a multiple of "
                "the number of processes"
            )
        each = of // self.world
        return range(self.rank * each, (self.rank + 1) * each)

    def sum(self, values: Sequence[int]) -> PendingSum:
        """Begins to add up `values` over all processes, on the host."""
        if self.world == 1:
            return PendingSum(torch.tensor(values), None)
        tensor = torch.tensor(values, dtype=torch.int64)
        return PendingSum(tensor, dist.all_reduce(tensor, group=self.group, async_op=True))

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process. All must call it."""
        return self.sum([flag]).result()[0] > 0

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank, in every process. Pickled: for small things."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def on_main(self, work: Callable[[], T]) -> T:
        """Runs `work` in the main process, while the others wait, and returns its result in all.

        Its exception is raised in the main process; the others end quietly.
        """
        if self.world == 1:
            return work()
        outcome: list[Any] = [None, False]
        failure: BaseException | None = None
        if self.main:
            try:
                outcome = [work(), True]
            except BaseException as error:
                failure = error
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        if failure is not None:
            raise failure
        if not outcome[1]:
            raise PeerFailed
        return outcome[0]

    def prepare(self, work: Callable[[], T]) -> T:
        """As `on_main`, for work of any length: the others ask for its end instead of waiting in a collective, which
        would give up after half an hour."""
        if self.world == 1 or self.store is None:
            return work()
        self._prepared.append(f"dreamllm/prepared/{len(self._prepared)}")
        key = self._prepared[-1]
        outcome: Any = None
        if self.main:
            try:
                outcome = work()
            except BaseException:
                self.store.set(key, "failed")
                raise
            self.store.set(key, "done")
        else:
            while not self.store.check([key]):
                if self.store.check([_FAILURE]):
                    raise PeerFailed
                time.sleep(_PAUSE_SECONDS)
            if self.store.get(key) != b"done":
                raise PeerFailed
        return self.on_main(lambda: outcome)

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self.world > 1:
            dist.barrier(group=self.group)


@dataclass
class PendingSum:
    """A sum over all processes that may still be on its way."""

    tensor: torch.Tensor
    work: Any

    def result(self) -> list[int]:
        if self.work is not None:
            self.work.wait()
        return self.tensor.tolist()


_running: Processes | None = None


@contextlib.contextmanager
def processes(device: str = "auto", grouped: bool = False) -> Iterator[Processes]:
    """Joins the processes that a launcher (torchrun) started, or is alone; leaves them in the end.

    `device` "auto" is CUDA when there is one; each process takes the GPU of its local rank. A process that is alone
    gets a process group only when `grouped`. Inside another `processes`, this is that one.

    When one process fails, its exception is raised as it is; in the others, what was waiting for it raises
    `PeerFailed`, which ends them without a message. A process that vanished without a word (killed) is reported by one
    of the others as `ProcessLostError`.
    """
    global _running
    if _running is not None and (_running.grouped or not grouped):
        yield _running
        return
    outer, _running = _running, _join(device, grouped)
    try:
        yield _running
    except TrainingInterrupted:  # which all processes agreed on
        _leave(_running)
        raise
    except Exception as error:
        _tell(_running, error)
        raise
    else:
        _leave(_running)
    finally:
        _running = outer


def _join(device: str, grouped: bool) -> Processes:
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    world = int(os.environ["WORLD_SIZE"]) if launched else 1
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if cuda and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch sees no GPU")
    chosen = torch.device("cpu")
    if cuda:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"local process {local} has no GPU of its own: there are {torch.cuda.device_count()}; start as many "
                "processes per node as it has GPUs"
            )
        chosen = torch.device("cuda", local) if launched else torch.device("cuda")
    if world == 1 and not grouped:
        return Processes(0, 1, chosen)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    store: dist.Store = dist.HashStore()
    rank = 0
    if world > 1:
        store, rank, world = next(dist.rendezvous("env://"))
        # torchrun keeps one store over restarts: what the attempt before left there must not be taken for ours.
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank, world_size=world)
    group = dist.new_group(backend="gloo") if chosen.type == "cuda" else dist.group.WORLD
    return Processes(rank, world, chosen, store, group, dist.new_group(backend="gloo"))


def _leave(these: Processes) -> None:
    """All arrive before any closes its connections."""
    if these.grouped:
        these.wait()
        dist.destroy_process_group()


def _tell(these: Processes, error: Exception) -> None:
    """Claims the failure of the run for this process, or raises `PeerFailed` when it is another one's."""
    if these.world == 1 or these.store is None:
        _leave(these)
        return
    lost = _is_communication(error)
    with contextlib.suppress(dist.DistError, RuntimeError):  # the process that holds the store may be gone
        if lost and _told_in_time(these.store):
            raise PeerFailed from error
        claimed = these.store.compare_set(_FAILURE, "", str(these.rank)).decode()
        if claimed != str(these.rank):
            raise PeerFailed from error
    if lost:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ProcessLostError(
            f"another process of the run ended without a message (killed, or its node was lost): {first}. "
            "Rerun the same command to go on from the last checkpoint; torchrun --max-restarts does so by itself"
        ) from error


def _told_in_time(store: dist.Store) -> bool:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if store.check([_FAILURE]):
            return True
        time.sleep(0.05)
    return False


def _is_communication(error: Exception) -> bool:
    """Whether a collective failed because a peer is gone. gloo says so only in words."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "Connection", "NCCL"))
