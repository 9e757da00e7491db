"""Finds where the host waits for the device inside a training step, on a machine without one too."""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dreamllm.profiling.operators import short_name, tensors_in

READS_A_VALUE = {"_local_scalar_dense", "item", "is_nonzero", "equal", "allclose"}
SHAPE_FROM_VALUES = {
    "nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount", "argwhere",
}  # fmt: skip
LEAVES_TORCH = {"tolist", "numpy", "__array__"}
"""Methods that read a tensor's memory without an operator when it is on the CPU."""

_MASKED = {"index", "index_put", "index_put_", "_index_put_impl_"}


@dataclass(frozen=True)
class Synchronisation:
    """A call that makes the host wait: what it is, and the line of our code that made it."""

    operator: str
    where: str


class HostSynchronisations:
    """`with HostSynchronisations() as found: ...` lists in `found.calls` every call that would wait for a device.

    That is a value read (`item`, `bool`, `tolist`, `numpy`, a copy to the CPU that blocks) or a shape that depends on
    values (`nonzero`, boolean masks). On the CPU these cost little; the same step on a GPU would stall.
    """

    def __init__(self) -> None:
        self.calls: list[Synchronisation] = []
        self._modes = (_Functions(self), _Operators(self))

    def __enter__(self) -> HostSynchronisations:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def found(self, operator: str) -> None:
        self.calls.append(Synchronisation(operator, _our_line()))

    def summary(self) -> list[str]:
        """One line per place: how often, what, where."""
        counted = Counter(self.calls)
        return [f"{count} x {call.operator} at {call.where}" for call, count in counted.most_common()]


@dataclass
class _Operators(TorchDispatchMode):
    watch: HostSynchronisations = field(repr=False)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = short_name(function)
        if name in READS_A_VALUE or name in SHAPE_FROM_VALUES:
            self.watch.found(name)
        elif name in _MASKED and any(index.dtype in (torch.bool, torch.uint8) for index in tensors_in(args[1])):
            self.watch.found(f"{name} with a mask")
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.watch.found(name)
        result = function(*args, **kwargs)
        if name in ("_to_copy", "copy_") and _blocks(name, args, kwargs, result):
            self.watch.found("copy to the CPU")
        return result


class _Functions(TorchFunctionMode):
    def __init__(self, watch: HostSynchronisations) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in LEAVES_TORCH:
            self.watch.found(function.__name__)
        return function(*args, **(kwargs or {}))


def _blocks(name: str, args: Any, kwargs: Any, result: Any) -> bool:
    source = args[1] if name == "copy_" else args[0]
    asynchronous = kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
    return source.device.type != "cpu" and result.device.type == "cpu" and not asynchronous


def _our_line() -> str:
    """The innermost line outside torch and this file."""
    torch_folder = str(Path(torch.__file__).parent)
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith((torch_folder, __file__, "<")):
            return f"{Path(frame.filename).parent.name}/{Path(frame.filename).name}:{frame.lineno}"
    return "unknown"
