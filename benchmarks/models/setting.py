"""Where and as what a workload's models are made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from benchmarks.harness import Part
from dreamllm.model import DreamLLM, DreamLLMProcessor
from dreamllm.workloads import make_model, make_processor, model_config

LARGE = "7b"


@dataclass(frozen=True)
class Setting:
    """A size of dreamllm.workloads, on a device, with everything in one dtype: weights, gradients, moments.

    `layers`: of the decoder, where not as many as the size has.
    """

    size: str
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    layers: int | None = None

    @classmethod
    def usual(cls, size: str, device: str = "cpu") -> Setting:
        """The 7b in bfloat16, weights too, as the original trains and ships it (spec D.2); smaller ones in float32."""
        return cls(size, device, torch.bfloat16 if size == LARGE else torch.float32)

    def with_layers(self, layers: int | None) -> Setting:
        return replace(self, layers=layers)

    @property
    def rounds(self) -> bool:
        """Whether two programs differ by more than float32 rounding."""
        return self.dtype != torch.float32

    @property
    def part(self) -> Part | None:
        """Of its layers; None for a whole model."""
        if self.layers is None:
            return None
        return Part("layers", self.layers, model_config(self.size).text_config.num_hidden_layers)

    @property
    def note(self) -> str:
        """What differs from a whole model in float32, to go before a label."""
        layers = "" if self.part is None else self.part.note
        return layers + (f"{str(self.dtype).removeprefix('torch.')}, " if self.rounds else "")

    def model(self) -> DreamLLM:
        """With random weights, the same ones in every call; made on the device in its dtype."""
        return make_model(self.size, 0, self.device, self.dtype, self.layers).eval()

    def processor(self) -> DreamLLMProcessor:
        return make_processor(self.size)

    def generator(self, seed: int = 1) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Inside, the same weights in float32, where bfloat16 numbers are exact; no second copy, and all as it was after.

    Buffers stay: those of the rotary embedding are float32 in every model.
    """
    before = [parameter.dtype for parameter in model.parameters()]
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products
        for parameter, dtype in zip(model.parameters(), before, strict=True):
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
