"""Every operator of a training step with its part, cost and time, and the memory that it leaves behind."""

from __future__ import annotations

import time
import weakref
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dreamllm.profiling.operators import (
    FlopCounter,
    bytes_moved,
    kind_of,
    makes_a_view,
    short_name,
    signature,
    tensors_in,
)
from dreamllm.profiling.parts import PartTracker

HELD_COPIES = "parameters in the precision that computes"
GRADIENTS = "gradients"
"""What autocast makes of parameters: counted apart from activations, whichever part made it."""


@dataclass
class Operator:
    """Calls with the same signature in the same part and phase; `flops` and `bytes` of one call.

    `seconds`: of all calls together, 0 where nothing was timed.
    """

    name: str
    kind: str
    signature: str
    part: str
    phase: str
    flops: int
    bytes: int
    calls: int = 0
    seconds: float = 0.0


class Recorder(TorchDispatchMode):
    """Records the operators that run while it is entered.

    tracker: says where the step is. flops: counts the operations of a call. timed: measures each call, on CUDA with
    events. Works on real tensors and on fake ones, which have shapes but no values.
    """

    def __init__(self, tracker: PartTracker, flops: FlopCounter, timed: bool = False) -> None:
        super().__init__()
        self.tracker, self.timed = tracker, timed
        self.flops = flops
        self.memory = LiveMemory()
        self._operators: dict[tuple[str, str, str], Operator] = {}
        self._events: list[tuple[Operator, torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def operators(self) -> list[Operator]:
        for operator, begin, end in self._events:
            end.synchronize()
            operator.seconds += begin.elapsed_time(end) / 1e3
        self._events.clear()
        return list(self._operators.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace in ("prim", "profiler") or makes_a_view(function):
            return function(*args, **kwargs)
        part, phase = self.tracker.now()
        if function.namespace in ("c10d", "_c10d_functional"):
            part = "communication"
        key = (signature(function, args, kwargs), part, phase)
        begin = self._begin(args)
        result = function(*args, **kwargs)
        operator = self._operators.get(key)
        if operator is None:
            name = short_name(function)
            flops = self.flops.count(function, args, kwargs, result)
            moved = bytes_moved(function, args, kwargs, result)
            operator = self._operators[key] = Operator(name, kind_of(name), *key, flops=flops, bytes=moved)
        operator.calls += 1
        self._end(operator, begin)
        copied = operator.name == "_to_copy" and self.memory.holds(args[0])
        self.memory.add(result, HELD_COPIES if copied else part, phase)
        return result

    def _begin(self, args: Any) -> Any:
        if not self.timed:
            return None
        if any(tensor.is_cuda for tensor in tensors_in(args)):
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.perf_counter()

    def _end(self, operator: Operator, begin: Any) -> None:
        if isinstance(begin, float):
            operator.seconds += time.perf_counter() - begin
        elif begin is not None:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._events.append((operator, begin, end))


class LiveMemory:
    """Bytes of the tensors made while recording that are still alive, by (part, phase) that made them.

    `hold` names memory that was there before; it is not part of `peak`, which is the most that lived at one time.
    `peak_besides_gradients` is the most without the parameters' gradients, which a sharded run does not keep whole.
    """

    def __init__(self) -> None:
        self.live: dict[tuple[str, str], int] = defaultdict(int)
        self.total = self.peak = self.peak_besides_gradients = 0
        self.at_peak: dict[tuple[str, str], int] = {}
        self.at_peak_besides_gradients: dict[tuple[str, str], int] = {}
        self.peak_of: dict[str, int] = defaultdict(int)
        self._known: dict[int, weakref.ref] = {}
        self._keys: dict[int, tuple[str, str]] = {}
        self._held: set[int] = set()

    def hold(self, tensors: Iterable[Tensor]) -> int:
        """Marks `tensors` as there already. Returns their bytes."""
        size = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._known[storage._cdata] = weakref.ref(storage, self._forget(storage._cdata))
                self._held.add(storage._cdata)
                size += storage.nbytes()
        return size

    def holds(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._held

    def becomes(self, tensor: Tensor, key: tuple[str, str]) -> None:
        """The memory of `tensor`, made while recording, is now of another kind."""
        storage = tensor.untyped_storage()
        before = self._keys.get(storage._cdata)
        if before is not None and before != key:
            self.live[before] -= storage.nbytes()
            self.live[key] += storage.nbytes()
            self._keys[storage._cdata] = key
            self.peak_of[key[0]] = max(self.peak_of[key[0]], self.live[key])

    def _forget(self, address: int) -> Any:
        return lambda _: self._known.pop(address, None)

    def add(self, result: Any, part: str, phase: str) -> None:
        for tensor in tensors_in(result):
            storage = tensor.untyped_storage()
            address = storage._cdata
            if address in self._known:
                continue
            size = storage.nbytes()
            self._known[address] = weakref.ref(storage, self._release(address, size))
            self._keys[address] = (part, phase)
            self.live[part, phase] += size
            self.total += size
            self._note(part)

    def _note(self, part: str) -> None:
        self.peak_of[part] = max(self.peak_of[part], sum(b for (p, _), b in self.live.items() if p == part))
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, {key: b for key, b in self.live.items() if b}
        others = self.total - self.live.get((GRADIENTS, "backward"), 0)
        if others > self.peak_besides_gradients:
            self.peak_besides_gradients = others
            self.at_peak_besides_gradients = {k: b for k, b in self.live.items() if b and k[0] != GRADIENTS}

    def _release(self, address: int, size: int) -> Any:
        def release(_: object) -> None:
            self._known.pop(address, None)
            self.live[self._keys.pop(address)] -= size
            self.total -= size

        return release
