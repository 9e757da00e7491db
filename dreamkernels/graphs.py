"""Functions of tensors as CUDA graphs: captured once per shape, then one launch instead of hundreds.

graphs = GraphedCalls()
y = graphs("decode", decode, x, lengths)      # decode(x, lengths)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["GraphedCalls", "addresses_of", "bucket_of"]

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]
"""Takes what computes a result from tensors that stay where they are; returns what computes it again, into the result's
own memory, and the result."""

MOST_GRAPHS = 32


class _Graph(NamedTuple):
    inputs: tuple[Tensor, ...]
    replay: Callable[[], object]
    result: Tensor
    function: Any  # kept: the graph holds addresses of what it refers to


def bucket_of(count: int) -> int:
    """The least power of two that is at least `count`: the size of the graph that serves so many rows."""
    if count < 1:
        raise ValueError(f"a graph serves at least one row, not {count}")
    return 1 << (count - 1).bit_length()


def addresses_of(tensors: Iterable[Tensor]) -> int:
    """A part of a key that changes when a tensor moves, such as a model's parameters under `.to()`."""
    return hash(tuple(tensor.data_ptr() for tensor in tensors))


class GraphedCalls:
    """Captured calls. The latest `most` are kept; every one keeps the memory of its intermediate results.

    `capture`: how a call is captured. By default by `torch.cuda.CUDAGraph`.
    """

    def __init__(self, most: int = MOST_GRAPHS, capture: Capture | None = None) -> None:
        if most < 1:
            raise ValueError(f"at least one graph must be kept, not {most}")
        self._most, self._capture = most, capture or capture_graph
        self._graphs: dict[Hashable, _Graph] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def __call__(self, key: Hashable, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """function(*inputs), captured at its first call with this key and these shapes and replayed after that.

        `function` must launch the same kernels on the same memory whenever the key is the same, besides its inputs, and
        must not wait for the device. The result is overwritten by the next call.
        """
        full = (key, *((tuple(x.shape), x.dtype, x.device) for x in inputs))
        graph = self._graphs.pop(full, None)
        if graph is None:
            kept = tuple(x.clone() for x in inputs)
            replay, result = self._capture(lambda: function(*kept))
            graph = _Graph(kept, replay, result, function)
            while len(self._graphs) >= self._most:
                self._graphs.pop(next(iter(self._graphs)))  # the one used longest ago
        self._graphs[full] = graph
        for mine, given in zip(graph.inputs, inputs, strict=True):
            mine.copy_(given)
        graph.replay()
        return graph.result


def capture_graph(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """As a CUDA graph, after one run that compiles kernels and allocates their workspaces."""
    current = torch.cuda.current_stream()
    stream = torch.cuda.Stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        run()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result
