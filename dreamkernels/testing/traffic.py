"""How often Triton kernels touch each byte of global memory, counted by the interpreter.

    with count_traffic() as traffic:
        y = rms_norm(x, weight, implementation="triton")
    traffic.reads(x), traffic.writes(y)        # 1.0, 1.0: every element once

A memory-bound kernel is at its limit only if this is the least possible; caches do not show here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder


@dataclass
class Traffic:
    """Addresses that were read and written, one array per instruction of a program."""

    read_addresses: list[np.ndarray] = field(default_factory=list)
    written_addresses: list[np.ndarray] = field(default_factory=list)

    def reads(self, tensor: torch.Tensor) -> float:
        """Elements of a contiguous tensor that were read, counted as often as they were, per element."""
        return _accesses(self.read_addresses, tensor)

    def writes(self, tensor: torch.Tensor) -> float:
        return _accesses(self.written_addresses, tensor)


def _accesses(groups: list[np.ndarray], tensor: torch.Tensor) -> float:
    assert tensor.is_contiguous(), "the elements of a strided tensor are not one range of addresses"
    begin = tensor.data_ptr()
    end = begin + tensor.numel() * tensor.element_size()
    inside = sum(int(((group >= begin) & (group < end)).sum()) for group in groups)
    return inside / max(1, tensor.numel())


@contextlib.contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Within it, kernels that the interpreter runs record their loads and stores. Keep shapes small, outputs alive."""
    traffic = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def addresses(pointers: Any, mask: Any) -> np.ndarray:
        return np.broadcast_to(pointers.data, np.shape(mask.data))[np.asarray(mask.data, dtype=bool)].astype(np.uint64)

    def counted_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        traffic.read_addresses.append(addresses(ptrs, mask))
        return load(self, ptrs, mask, *rest)

    def counted_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.written_addresses.append(addresses(ptrs, mask))
        return store(self, ptrs, value, mask, *rest)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", counted_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counted_store),
    ):
        yield traffic
