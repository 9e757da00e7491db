"""The model over several processes: FSDP2 over a device mesh, one decoder layer at a time.

Every way of sharding is one mesh of (replicas, shards):

    none     every process holds everything     (W, 1)
    hybrid   within groups of `shard_size`      (W / size, size)
    full     over all processes                 (W,); weights are gathered layer by layer, forward and backward
    grad_op  over all processes                 (W,); weights stay gathered from forward to backward

What trains is held in float32 (or in bfloat16 for "pure_bfloat16") and computes in the precision's dtype; gradients
are added up in float32. What is frozen is not kept in float32 beside bfloat16; it is whole in every process, or spread
as well where it is large (`frozen.py`).

A model may come without contents (`loading.empty_model`): then each process reads its part and never holds a whole one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
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
from dreamllm.training.frozen import GATHERED, GatheredPart, large_parts, layers_of, make_whole
from dreamllm.training.loading import read_parameters
from dreamllm.training.lora import fill_adapters, is_adapter, stored_name
from dreamllm.training.metrics import StepCounts
from dreamllm.training.step import Pass, lane_loss


class ShardedModel(Pass):
    """`model`, sharded in place for `stage`; runs the lanes of this process.

    To be made after the model's `requires_grad` flags are set. A stage that trains other parameters needs a model that
    was not sharded yet. `source`: the folder from which parameters on the meta device are read; `seed`: of adapters
    among them. Raises `ValueError` when the processes do not divide into the groups asked for, and `CheckpointError`.
    """

    keeps_gradients = False

    def __init__(
        self,
        model: DreamLLM,
        stage: StageConfig,
        settings: RunSettings,
        processes: Processes,
        source: Path | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.stage, self.settings, self.processes = model, stage, settings, processes
        self.mesh = make_mesh(settings, processes)
        self.parts = self._place_frozen(source)
        layers = [layer for layer in layers_of(model) if "language_model" in self.large or _trains(layer)]
        spread = {p for layer in layers for p in layer.parameters()} if "language_model" in self.large else set()
        whole = {p for p in model.parameters() if not p.requires_grad} - spread
        if settings.compile_layers:
            compile_layers(model)
        common: dict[str, Any] = {"mesh": self.mesh, "mp_policy": _policy(settings), "ignored_params": whole}
        self.lane = _Lane(model, stage, layers, self.parts, bool(spread), processes.device)
        self.regathers = settings.sharding != "grad_op" or bool(spread)
        for layer in layers:
            fully_shard(layer, reshard_after_forward=self.regathers, **common)
        # The head is used by an operator, outside its module, and embeddings, queries and projectors are needed at
        # both ends of the pass: the root's weights are gathered once.
        self.root: FSDPModule = fully_shard(self.lane, reshard_after_forward=False, **common)
        self._fill(source, seed)
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

    def _place_frozen(self, source: Path | None) -> list[GatheredPart]:
        """Frozen parameters to where they stay, in the dtype that computes: they need no master copy."""
        model, settings, device = self.model, self.settings, self.processes.device
        computes = None if settings.precision == "float32" else torch.bfloat16
        fused = model.operators is not None or source is not None
        model.use_fused_operators(False)  # they may keep copies of frozen weights
        self.large = large_parts(model, settings.shard_frozen_above_mib, computes)
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(computes or parameter.dtype)
        make_whole(model, self.large, device, source)
        parts = self.large & set(GATHERED)
        if fused and settings.fused_operators:
            model.use_fused_operators(keep_copies=not parts)
        mesh = self.mesh["shard"]
        return [GatheredPart(model, name, mesh, device, source) for name in GATHERED if name in parts]

    def _fill(self, source: Path | None, seed: int) -> None:
        """Gives the spread parameters memory, each process its part, and reads or draws them."""
        absent = {name for name, parameter in self.model.named_parameters() if parameter.is_meta}
        device = self.processes.device
        self.lane._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
        named = {name: p.detach() for name, p in self.model.named_parameters() if name in absent}
        read_parameters(source, {stored_name(name): p for name, p in named.items() if not is_adapter(name)})
        fill_adapters(named.items(), seed)

    @contextmanager
    def whole(self) -> Iterator[None]:
        for unit in self.units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        for part in self.parts:
            part.gather()
        try:
            yield
        finally:
            for part in self.parts:
                part.release()
            for unit in self.units:
                unit.set_reshard_after_forward(unit is not self.root and self.regathers, recurse=False)
                unit.reshard()

    def sum(self, losses: Tensor) -> Tensor:
        if self.processes.world > 1:
            dist.all_reduce(losses)
        return losses


class _Lane(nn.Module):
    """Forward of one lane. FSDP's root: its weights are gathered in here.

    Collectives only match when every process runs the same ones, whatever its documents hold. So the loss depends on
    every weight of the root, and on the decoder's states, if only with a gradient of zero; with `attached`, the states
    depend on something, so that frozen layers are gathered for a backward pass, too; and `parts` are gathered and
    dropped at fixed points, needed or not.
    """

    def __init__(
        self,
        model: DreamLLM,
        stage: StageConfig,
        layers: list[nn.Module],
        parts: list[GatheredPart],
        attached: bool,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.model, self.stage = model, stage
        in_layers = {id(p) for layer in layers for p in layer.parameters()}
        names = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in in_layers]
        self._owners = [(model.get_submodule(owner), last) for owner, _, last in (n.rpartition(".") for n in names)]
        self._states: list[Tensor] = []
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        self._seeing = [part for part in parts if part.name == "vision_model"]
        self._drawing = [part for part in parts if part.name != "vision_model"]
        model.splits_creation = not attached
        self._in_layers, self._attached, self._running = bool(layers), attached, False
        model.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True)
        model.decoder.register_forward_hook(self._after_decoder)

    def forward(self, batch: PackedBatch, counts: StepCounts, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        self._hold(self._seeing)
        self._running = True
        try:
            total, parts = lane_loss(self.model, batch, counts, self.stage, generator, nullcontext())
            weights = [getattr(module, name) for module, name in self._owners]
            total = _Reach.apply(total, *self._states, *weights)
        finally:
            self._running = False
            self._states.clear()
        self._hold(())
        return total, parts

    def _before_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._running:  # a sample is drawn from the whole model
            return None
        self._hold(())
        if not self._attached:
            return None
        return args, {**kwargs, "inputs_embeds": _Reach.apply(kwargs["inputs_embeds"], self._anchor)}

    def _after_decoder(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._running:
            return
        if self._in_layers:
            self._states.append(output.last_hidden_state)
        self._hold(self._drawing)

    def _hold(self, parts: Sequence[GatheredPart]) -> None:
        """Makes `parts` whole, and no others."""
        for part in (*self._seeing, *self._drawing):
            if part not in parts:
                part.release()
        for part in parts:
            part.gather()


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


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def gathered(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Each whole, one after the other. All processes must go through all of them."""
    for name, tensor in named:
        value = tensor.detach()
        yield name, value.full_tensor() if isinstance(value, DTensor) else value
