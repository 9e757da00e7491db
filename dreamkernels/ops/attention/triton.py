"""GPU kernels of attention. Being written: nothing ships yet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

from dreamkernels.ops.launch import ShippedKernel


def attention(*arguments: Any) -> NoReturn:
    raise NotImplementedError('attention has no Triton kernels yet; choose implementation="reference"')


attention_backward = attention


def shipped_kernels(architecture: str) -> Iterator[ShippedKernel]:
    return iter(())
