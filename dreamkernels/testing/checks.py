"""Properties that every operator has: it is registered completely, compiles once, repeats bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch._dynamo

from dreamkernels import libraries


def check_operator(overload: Any, cases: Iterable[Sequence[Any]]) -> None:
    """Runs torch.library.opcheck (schema, autograd, fake tensor, AOT dispatch with dynamic shapes) on each case."""
    for arguments in cases:
        torch.library.opcheck(overload, tuple(arguments))


def assert_compiles_once(
    function: Callable[..., Any], calls: Sequence[Sequence[Any]], backend: str = "inductor", dynamic: bool | None = None
) -> None:
    """Asserts that torch.compile(fullgraph=True) gives the results of eager on every call and compiles for the first
    one only.

    The calls must not differ in what legitimately recompiles (dtype, number of dimensions, and shapes unless
    dynamic=True).
    """
    torch._dynamo.reset()
    frames = 0

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        nonlocal frames
        frames += 1
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(function, fullgraph=True, backend=counting, dynamic=dynamic)
    for arguments in calls:
        torch.testing.assert_close(compiled(*arguments), function(*arguments), rtol=0, atol=0)
    assert frames == 1, f"{frames} compilations for {len(calls)} calls"


def assert_repeats_bitwise(function: Callable[[], Any], repeats: int = 3) -> None:
    """Asserts that calls give bitwise equal tensors, also with one thread instead of several (CPU)."""

    def tensors() -> list[torch.Tensor]:
        result = function()
        return [result] if isinstance(result, torch.Tensor) else list(result)

    first = tensors()
    threads = torch.get_num_threads()
    try:
        for count in [threads] * (repeats - 1) + [1]:
            torch.set_num_threads(count)
            for number, (a, b) in enumerate(zip(first, tensors(), strict=True)):
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), (
                    f"tensor {number} differs ({count} threads)"
                )
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def using_cpu_isa(isa: str) -> Iterator[None]:
    """Within it the compiled CPU operators use one instruction set, one of `supported_cpu_isas()`."""
    before = libraries.cpu_isa()
    libraries.set_cpu_isa(isa)
    try:
        yield
    finally:
        libraries.set_cpu_isa(before)
