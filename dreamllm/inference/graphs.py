"""Denoising loops as CUDA graphs: one launch instead of thousands."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dreamkernels import GraphedCalls
from dreamllm.inference.loop import Loop, OnStep
from dreamllm.model import DreamLLM


class DenoisingGraphs:
    """Denoising loops captured as CUDA graphs, kept from one `draw` to the next.

    A loop is captured at its first use, for its number of pictures, size and options, and replayed after that: one
    launch instead of thousands. Pictures are those of `draw` without it. A parameter of the UNet that moves to another
    address, as `.to()` may do, makes a new capture; a change of values does not.
    """

    def __init__(self) -> None:
        self._graphs = GraphedCalls()

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, loop: Loop, latents: Tensor, context: Tensor, noises: Sequence[Tensor | None]) -> Tensor:
        """Runs a loop on its inputs, as `loop.run` does."""

        def whole(latents: Tensor, context: Tensor, *noises: Tensor) -> Tensor:
            following = iter(noises)
            return loop.run(latents, context, lambda: next(following))

        given = [noise for noise in noises if noise is not None]
        return self._graphs(loop.key(), whole, latents, context, *given).clone()


def check_graphs(model: DreamLLM, loop: Loop, on_step: OnStep | None) -> None:
    if model.device.type != "cuda":
        raise ValueError(f"CUDA graphs need a model on cuda, not on {model.device}; leave graphs=None")
    if on_step is not None:
        raise ValueError("on_step cannot look into a CUDA graph; leave one of on_step and graphs out")
    if loop.schedule is None:
        raise ValueError("this scheduler's own steps stop the host, so they cannot be captured; leave graphs=None")
