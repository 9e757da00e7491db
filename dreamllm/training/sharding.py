"""The model over several processes: FSDP2 over a device mesh, one decoder layer at a time.

Every way of sharding is one mesh of (replicas, shards):

    none     every process holds everything     (W, 1)
    hybrid   within groups of `shard_size`      (W / size, size)
    full     over all processes                 (W,); weights are gathered layer by layer, forward and backward
    grad_op  over all processes                 (W,); weights stay gathered from forward to backward

What trains is held in float32 (or in bfloat16 for "pure_bfloat16") and computes in the precision's dtype; gradients
are added up in float32. What is frozen stays whole in every process and is not kept in float32 beside bfloat16.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from dreamllm.documents import PackedBatch
from dreamllm.model import DreamLLM
from dreamllm.training.configuration import RunSettings, StageConfig
from dreamllm.training.distributed import Processes
from dreamllm.training.metrics import StepCounts
from dreamllm.training.step import Pass, lane_loss


class ShardedModel(Pass):
    """`model`, sharded in place for `stage`; runs the lanes of this process.

    To be made after the model's `requires_grad` flags are set. A stage that trains other parameters needs a model that
    was not sharded yet. Raises `ValueError` when the processes do not divide into the groups asked for.
    """

    keeps_gradients = False

    def __init__(self, model: DreamLLM, stage: StageConfig, settings: RunSettings, processes: Processes) -> None:
        self.model, self.stage, self.settings, self.processes = model, stage, settings, processes
        self.mesh = make_mesh(settings, processes)
        decoder: Any = model.decoder
        layers = [layer for layer in decoder.layers if any(p.requires_grad for p in layer.parameters())]
        whole = {p for p in model.parameters() if not p.requires_grad}
        _make_whole(model, whole, settings, processes.device)
        if settings.compile_layers:
            compile_layers(model)
        common: dict[str, Any] = {"mesh": self.mesh, "mp_policy": _policy(settings), "ignored_params": whole}
        self.lane = _Lane(model, stage, layers)
        for layer in layers:
            fully_shard(layer, reshard_after_forward=settings.sharding != "grad_op", **common)
        # The head is used by an operator, outside its module, and embeddings, queries and projectors are needed at
        # both ends of the pass: the root's weights are gathered once.
        self.root: FSDPModule = fully_shard(self.lane, reshard_after_forward=False, **common)
        for parameter in model.parameters():
            parameter.grad = None
        self.units = [module for module in self.lane.modules() if isinstance(module, FSDPModule)]
        for unit in self.units:
            # Losses are divided by what the whole step holds: gradients are sums. gloo has no other reduction.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)

    def run(
        self, batch: PackedBatch, counts: StepCounts, generator: torch.Generator, last: bool
    ) -> tuple[Tensor, Tensor]:
        self.root.set_requires_gradient_sync(last or self.settings.reduce_each_lane)
        self.root.set_is_last_backward(last)
        return self.lane(batch, counts, generator)

    @contextmanager
    def whole(self) -> Iterator[None]:
        for unit in self.units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            for unit in self.units:
                unit.set_reshard_after_forward(
                    unit is not self.root and self.settings.sharding != "grad_op", recurse=False
                )
                unit.reshard()

    def sum(self, losses: Tensor) -> Tensor:
        if self.processes.world > 1:
            dist.all_reduce(losses)
        return losses


class _Lane(nn.Module):
    """Forward of one lane. FSDP's root: its weights are gathered in here.

    Collectives only match when every process runs the same ones, whatever its documents hold. So the loss depends on
    every weight of the root, and on the decoder's states, if only with a gradient of zero.
    """

    def __init__(self, model: DreamLLM, stage: StageConfig, layers: list[nn.Module]) -> None:
        super().__init__()
        self.model, self.stage = model, stage
        in_layers = {id(p) for layer in layers for p in layer.parameters()}
        names = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in in_layers]
        self._owners = [(model.get_submodule(owner), last) for owner, _, last in (n.rpartition(".") for n in names)]
        self._states: list[Tensor] = []
        if layers:
            model.decoder.register_forward_hook(lambda *call: self._states.append(call[-1].last_hidden_state))

    def forward(self, batch: PackedBatch, counts: StepCounts, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        total, parts = lane_loss(self.model, batch, counts, self.stage, generator, nullcontext())
        weights = [getattr(module, name) for module, name in self._owners]
        total = _Reach.apply(total, *self._states, *weights)
        self._states.clear()
        return total, parts


class _Reach(torch.autograd.Function):
    """The first argument, with a gradient of zero for all others."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, *others: Tensor) -> Tensor:
        ctx.others = [(other.shape, other.dtype) for other in others]
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        (gradient,) = gradients
        return gradient, *(gradient.new_zeros((), dtype=dtype).expand(shape) for shape, dtype in ctx.others)


def shards(settings: RunSettings, processes: Processes) -> bool:
    """Whether a stage runs a `ShardedModel`: with several processes always."""
    return processes.world > 1 or settings.sharding != "none"


def compile_layers(model: DreamLLM) -> None:
    """Runs each of the decoder's layers through torch.compile, in place."""
    decoder: Any = model.decoder
    for layer in decoder.layers:
        layer.forward = torch.compile(layer.forward)


def make_mesh(settings: RunSettings, processes: Processes) -> DeviceMesh:
    """The mesh of `settings.sharding` over all processes. Raises `ValueError` when it does not divide them."""
    world, kind = processes.world, processes.device.type
    if settings.sharding in ("full", "grad_op"):
        return init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
    size = 1
    if settings.sharding == "hybrid":
        size = settings.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", world))
        if world % size:
            raise ValueError(f"{world} processes do not divide into groups of shard_size {size}")
    return init_device_mesh(kind, (world // size, size), mesh_dim_names=("replicate", "shard"))


def _policy(settings: RunSettings) -> MixedPrecisionPolicy:
    computes = {"float32": None, "bfloat16": torch.bfloat16, "pure_bfloat16": None}[settings.precision]
    return MixedPrecisionPolicy(param_dtype=computes, reduce_dtype=torch.float32)


def _make_whole(model: DreamLLM, whole: set[nn.Parameter], settings: RunSettings, device: torch.device) -> None:
    """Frozen parameters to the device, in the dtype that computes: they need no master copy."""
    fused = model.operators is not None
    model.use_fused_operators(False)  # they keep copies of frozen weights
    for parameter in whole:
        dtype = parameter.dtype if settings.precision == "float32" else torch.bfloat16
        parameter.data = parameter.data.to(device, dtype)
    model.use_fused_operators(fused)


def gathered(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The trained parameters by name, each whole, one after the other. All processes must go through all of them."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = parameter.detach()
            yield name, value.full_tensor() if isinstance(value, DTensor) else value
