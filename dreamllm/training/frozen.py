"""Frozen parts: whole in every process, or each process holding a piece of them until they are needed.

The decoder's layers need their weights in the backward pass, too, and are FSDP's. CLIP, VAE and UNet are needed once
per lane: nothing of them is read after the UNet's own backward pass, which follows its forward pass at once
(`dreamllm.model.diffusion.mean_in_parts`). They are gathered when the lane comes to them and dropped behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from dreamllm.model import DreamLLM
from dreamllm.training.loading import read_parameters, read_tensors, replace

GATHERED = ("vision_model", "unet", "vae")
"""Frozen parts that are needed once per lane."""

ADAPTED = ".base_layer."
"""Part of the name of a weight that has an adapter; in a model folder it is a dot."""


def large_parts(model: DreamLLM, threshold_mib: int | None, dtype: torch.dtype | None) -> set[str]:
    """The frozen parts that take more than `threshold_mib` MiB in `dtype` (None: their own). "language_model" is the
    decoder's layers, without their adapters."""
    if threshold_mib is None:
        return set()
    groups = {name: list(getattr(model, name).parameters()) for name in GATHERED}
    groups = {name: of for name, of in groups.items() if not any(p.requires_grad for p in of)}
    groups["language_model"] = [p for layer in layers_of(model) for p in layer.parameters() if not p.requires_grad]
    return {
        name
        for name, parameters in groups.items()
        if sum(p.numel() * (dtype or p.dtype).itemsize for p in parameters) > threshold_mib * 2**20
    }


def layers_of(model: DreamLLM) -> Sequence[nn.Module]:
    """The decoder's layers."""
    return list(model.decoder.layers)  # type: ignore[union-attr, arg-type]


def make_whole(model: DreamLLM, without: set[str], device: torch.device, source: Path | None) -> None:
    """Brings the frozen parameters of `model` but those of the parts `without` to `device`; those without contents are
    read from `source`."""
    spread = {id(p) for name in without & set(GATHERED) for p in getattr(model, name).parameters()}
    if "language_model" in without:
        spread |= {id(p) for layer in layers_of(model) for p in layer.parameters()}
    absent = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or id(parameter) in spread:
            continue
        if parameter.is_meta:
            replace(parameter, torch.empty_like(parameter, device=device))
            absent[name.replace(ADAPTED, ".")] = parameter.detach()
        else:
            parameter.data = parameter.data.to(device)
    read_parameters(source, absent)


class GatheredPart:
    """The parameters of a frozen part, laid end to end and cut by process; whole from `gather` to `release`.

    `mesh`: of the processes that hold one copy together. Parameters without contents are read from `source`. All
    processes must gather at the same points.
    """

    def __init__(self, model: DreamLLM, part: str, mesh: DeviceMesh, device: torch.device, source: Path | None) -> None:
        self.name = part
        named = [(f"{part}.{name}", parameter) for name, parameter in getattr(model, part).named_parameters()]
        self.parameters = [parameter for _, parameter in named]
        self.mesh = mesh
        ends = torch.tensor([parameter.numel() for parameter in self.parameters]).cumsum(0).tolist()
        self.starts = [0, *ends]
        # In their own memory format; a view of part of the whole can have any.
        self.layouts = [(p.shape, p.stride()) for p in self.parameters]
        (dtype,) = {parameter.dtype for parameter in self.parameters}
        size = -(-ends[-1] // mesh.size())
        self.own = torch.zeros(size, dtype=dtype, device=device)
        begin = mesh.get_local_rank() * size
        held = {}
        for (name, parameter), start, end in zip(named, self.starts, ends, strict=False):
            if start < begin + size and end > begin:
                held[name] = start
                if not parameter.is_meta:
                    self._keep(parameter.detach(), start, begin)
        if any(parameter.is_meta for parameter in self.parameters):
            strides = dict(zip((name for name, _ in named), self.layouts, strict=True))
            assert source is not None
            for name, tensor in read_tensors(source, held):
                shape, stride = strides[name]
                self._keep(torch.empty_strided(shape, stride, dtype=dtype).copy_(tensor), held[name], begin)
        for parameter in self.parameters:
            if parameter.is_meta:
                replace(parameter, self._nothing(parameter.shape))
        self.whole: Tensor | None = None
        self.release()

    def _keep(self, tensor: Tensor, start: int, begin: int) -> None:
        """Copies what of a parameter, which begins at `start` of the whole, belongs to this process."""
        flat = tensor.as_strided((tensor.numel(),), (1,))
        first, last = max(start, begin), min(start + flat.numel(), begin + self.own.numel())
        self.own[first - begin : last - begin] = flat[first - start : last - start].to(self.own)

    def gather(self) -> None:
        """Makes the parameters whole; nothing when they are."""
        if self.whole is not None:
            return
        self.whole = DTensor.from_local(self.own, self.mesh, [Shard(0)]).full_tensor()
        for parameter, start, (shape, stride) in zip(self.parameters, self.starts, self.layouts, strict=False):
            parameter.data = self.whole.as_strided(shape, stride, start)

    def release(self) -> None:
        """Drops what other processes hold."""
        for parameter, (shape, _) in zip(self.parameters, self.layouts, strict=True):
            parameter.data = self._nothing(shape)
        self.whole = None

    def _nothing(self, shape: torch.Size) -> Tensor:
        return self.own.new_zeros(()).expand(shape)
