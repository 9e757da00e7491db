"""A workload made ready: the model, optimiser and batches of the real training step, on real or on fake tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dreamllm.documents import PackedBatch
from dreamllm.model import DreamLLM
from dreamllm.profiling.operators import FlopCounter, tensors_in
from dreamllm.profiling.parts import PartTracker
from dreamllm.profiling.recorder import GRADIENTS, LiveMemory, Operator, Recorder
from dreamllm.training.configuration import StageConfig
from dreamllm.training.lora import add_adapters
from dreamllm.training.step import make_optimizer, prepare_model, train_step
from dreamllm.workloads import make_model

Precision = Literal["float32", "bfloat16", "pure_bfloat16"]
"""As `RunSettings.precision`; or parameters, gradients and moments in bfloat16 themselves."""


@dataclass
class Recording:
    """One training step, operator by operator.

    `held_bytes`: what lives before and after the step, by kind. `peak_bytes`: the most that lives during it beyond
    that, and `at_peak` what it consists of, by (part, phase) that made it; the parameters' gradients, which the step
    makes anew, are a part of their own. `at_peak_besides_gradients`: the same at the moment when the most lived besides
    them. `peak_of`: the most of each part alone.
    """

    operators: list[Operator]
    held_bytes: dict[str, int]
    peak_bytes: int
    at_peak: dict[tuple[str, str], int]
    peak_of: dict[str, int]
    at_peak_besides_gradients: dict[tuple[str, str], int]

    @property
    def flops(self) -> int:
        return sum(operator.flops * operator.calls for operator in self.operators)


@dataclass
class PreparedStep:
    """Runs `train_step`, as the trainer does, on `batches`."""

    model: DreamLLM
    optimizer: torch.optim.Optimizer
    config: StageConfig
    precision: Precision
    mode: contextlib.AbstractContextManager

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.precision != "bfloat16":
            return contextlib.nullcontext()
        return torch.autocast(self.model.device.type, torch.bfloat16)

    def run(self, batches: list[PackedBatch], seed: int = 0) -> Tensor:
        generator = torch.Generator(self.model.device).manual_seed(seed)
        return train_step(self.model, self.optimizer, batches, self.config, generator, self.autocast())

    def record(self, batch: PackedBatch, lengths: list[int], timed: bool) -> Recording:
        """Runs one step on `batch`, whose sequences have `lengths`, and records it."""
        with self.mode, PartTracker(self.model) as tracker:
            recorder = Recorder(tracker, FlopCounter(lengths, batch.query_spans), timed)
            self.optimizer.zero_grad(set_to_none=True)  # as every step begins
            held = self._hold(recorder.memory, batch)
            with recorder, self._gradients_told(recorder.memory):
                self.run([batch])
        memory = recorder.memory
        return Recording(
            recorder.operators,
            held,
            memory.peak,
            memory.at_peak,
            dict(memory.peak_of),
            memory.at_peak_besides_gradients,
        )

    @contextlib.contextmanager
    def _gradients_told(self, memory: LiveMemory) -> Iterator[None]:
        """Tells `memory` which tensors are parameters' gradients."""

        def told(parameter: Tensor) -> None:
            if parameter.grad is not None:
                memory.becomes(parameter.grad, (GRADIENTS, "backward"))

        trained = [p for p in self.model.parameters() if p.requires_grad]
        handles = [parameter.register_post_accumulate_grad_hook(told) for parameter in trained]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hold(self, memory: LiveMemory, batch: PackedBatch) -> dict[str, int]:
        parameters = list(self.model.parameters())
        trained = [p for p in parameters if p.requires_grad]
        return {
            "parameters": memory.hold(trained),
            "frozen parts": memory.hold([*parameters, *self.model.buffers()]),
            "optimiser": memory.hold(tensors_in(list(self.optimizer.state.values()))),
            "batch": memory.hold(tensors_in(vars(batch))),
        }


def prepare(
    size: str, config: StageConfig, precision: Precision, device: str = "cpu", fake: bool = False, seed: int = 0
) -> PreparedStep:
    """The model of `size` ready for steps of `config`, with its adapters and the optimiser's state in place.

    `fake`: tensors have shapes but no memory, so that a 7b fits everywhere and a step takes seconds.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
    dtype = torch.bfloat16 if precision == "pure_bfloat16" else torch.float32
    model = make_model(size, seed, "meta" if fake else device, dtype)
    if config.lora is not None:
        add_adapters(model, config.lora, seed)
    with mode:
        if fake:
            model.to_empty(device="cpu")
        optimizer = make_optimizer(prepare_model(model, config), config)
        model.use_less_memory()  # as a run does by default
        optimizer.step()  # on zero gradients: makes the moments, changes nothing
    return PreparedStep(model, optimizer, config, precision, mode)


def as_fake(batch: PackedBatch, step: PreparedStep) -> PackedBatch:
    """`batch` for a step on fake tensors."""
    assert isinstance(step.mode, FakeTensorMode)
    return batch._map(step.mode.from_tensor)
