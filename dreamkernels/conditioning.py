"""The condition of a diffusion UNet as keys and values of all its cross-attention layers, made once per picture.

weights = ConditionWeights.concatenate([(to_k.weight, to_v.weight, heads) for each layer])    # once per UNet
condition = condition_kv(states, weights, projector)                                          # once per picture
guided = DreamCondition.concatenate(null.repeat(4), condition.repeat(4))     # classifier-free guidance, 4 pictures
for each step, for each layer:  y = guided.attend(layer, q)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamkernels.frozen import FrozenProduct
from dreamkernels.ops.cross_conditioning import cross_conditioning

__all__ = ["ConditionLayer", "ConditionWeights", "DreamCondition", "condition_kv"]

_FORMAT = "dreamkernels.condition.1"


@dataclass(frozen=True)
class ConditionLayer:
    """One cross-attention layer: its keys, then its values, are `columns` successive columns of the product."""

    heads: int
    head_width: int

    @property
    def columns(self) -> int:
        return 2 * self.heads * self.head_width


def _describe(layers: Sequence[ConditionLayer]) -> str:
    widths = ", ".join(f"{layer.heads}x{layer.head_width}" for layer in layers[:20])
    return f"{len(layers)} layers of heads x width {widths}" + (", ..." if len(layers) > 20 else "")


@dataclass(frozen=True)
class ConditionWeights:
    """The key and value weights of every cross-attention layer, one below the other: [columns, condition width].

    They are frozen: a copy without gradient. SD 2.1 has 16 layers and 24,960 columns.
    """

    weight: Tensor
    layers: tuple[ConditionLayer, ...]
    product: FrozenProduct = field(init=False, repr=False, compare=False)  # on a CPU with a second copy in its layout

    def __post_init__(self) -> None:
        object.__setattr__(self, "product", FrozenProduct(self.weight, None))

    @staticmethod
    def concatenate(layers: Iterable[tuple[Tensor, Tensor, int]]) -> ConditionWeights:
        """From (key weight, value weight, heads) of each layer, in the order in which the UNet runs them.

        Both weights are [heads * head width, condition width], as those of diffusers' `to_k` and `to_v`.
        Raises ValueError when there is no layer, or shapes, dtypes or devices do not fit.
        """
        given = list(layers)
        if not given:
            raise ValueError("no layers were given; a UNet without cross-attention has no condition")
        first = given[0][0]
        for number, (key, value, heads) in enumerate(given):
            if key.dim() != 2 or key.shape != value.shape or heads < 1 or key.shape[0] % heads:
                raise ValueError(
                    f"layer {number}: key weight {list(key.shape)} and value weight {list(value.shape)} must both be "
                    f"[a multiple of {heads} heads, condition width]"
                )
            if key.shape[1] != first.shape[1]:
                raise ValueError(
                    f"layer {number} takes conditions of width {key.shape[1]}, layer 0 of {first.shape[1]}; "
                    "layers with conditions of their own need ConditionWeights of their own"
                )
            if any(weight.dtype != first.dtype or weight.device != first.device for weight in (key, value)):
                raise ValueError(
                    f"layer {number} is {key.dtype} on {key.device} and {value.dtype} on {value.device}, layer 0 is "
                    f"{first.dtype} on {first.device}; bring the UNet to one dtype and device"
                )
        weight = torch.cat([part.detach() for key, value, _ in given for part in (key, value)])
        return ConditionWeights(weight, tuple(ConditionLayer(heads, key.shape[0] // heads) for key, _, heads in given))

    @property
    def condition_width(self) -> int:
        return self.weight.shape[1]

    def layer_weights(self, layer: int) -> tuple[Tensor, Tensor]:
        """The key and value weight of a layer as views, so that a UNet's parameters may share this memory."""
        begin = sum(other.columns for other in self.layers[:layer])
        half = self.layers[layer].columns // 2
        return self.weight[begin : begin + half], self.weight[begin + half : begin + 2 * half]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ConditionWeights:
        return replace(self, weight=self.weight.to(device=device, dtype=dtype))


@dataclass(frozen=True)
class DreamCondition:
    """Keys and values of all cross-attention layers for each picture's condition.

    `columns` [conditions, keys, columns of all layers]; each condition serves `repeats` successive pictures without
    being copied, so a batch has conditions * repeats pictures, those of one condition side by side.
    """

    columns: Tensor
    layers: tuple[ConditionLayer, ...]
    repeats: int = 1
    _parts: tuple[Tensor, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        total = sum(layer.columns for layer in self.layers)
        if self.columns.dim() != 3 or self.columns.shape[-1] != total:
            raise ValueError(
                f"columns {list(self.columns.shape)} are not [conditions, keys, {total}], which "
                f"{_describe(self.layers)} need; the condition belongs to another model"
            )
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, not {self.repeats}")
        # One split for all layers: its backward is one concatenation, where slices would each fill the whole gradient.
        halves = [layer.columns // 2 for layer in self.layers for _ in range(2)]
        object.__setattr__(self, "_parts", torch.split(self.columns, halves, dim=-1))

    @property
    def pictures(self) -> int:
        return self.columns.shape[0] * self.repeats

    def key_value(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, both [conditions, keys, heads, head width], views of `columns`."""
        if not 0 <= layer < len(self.layers):
            raise ValueError(f"layer {layer} does not exist; the condition has {_describe(self.layers)}")
        shape = (self.layers[layer].heads, self.layers[layer].head_width)
        return self._parts[2 * layer].unflatten(-1, shape), self._parts[2 * layer + 1].unflatten(-1, shape)

    def attend(self, layer: int, q: Tensor, scale: float | None = None, implementation: str = "auto") -> Tensor:
        """Attention of q [pictures, positions, heads, head width] to a layer's keys (see `cross_conditioning`)."""
        self.check_pictures(q.shape[0])
        return cross_conditioning(q, *self.key_value(layer), scale, implementation)

    def check_pictures(self, pictures: int) -> None:
        """Raises ValueError unless a batch of so many pictures fits this condition."""
        if pictures != self.pictures:
            count = self.columns.shape[0]
            advice = (
                f"repeat({pictures // count}) makes it fit"
                if pictures and count and pictures % count == 0
                else f"possible are multiples of {count}"
            )
            raise ValueError(
                f"the batch has {pictures} pictures, but the condition serves {self.pictures} "
                f"({count} conditions, repeated {self.repeats} times); {advice}"
            )

    def check_layers(self, layers: Sequence[ConditionLayer]) -> None:
        """Raises ValueError unless the condition was made for a model with these layers."""
        if tuple(layers) != self.layers:
            raise ValueError(
                f"the condition was made for another model: it has {_describe(self.layers)}, "
                f"this model has {_describe(tuple(layers))}; make it anew with condition_kv"
            )

    def repeat(self, pictures: int) -> DreamCondition:
        """The same condition for `pictures` times as many pictures, each condition's side by side; copies nothing."""
        return replace(self, repeats=self.repeats * pictures)

    @staticmethod
    def concatenate(first: DreamCondition, second: DreamCondition) -> DreamCondition:
        """One condition for both batches, first's pictures before second's, as guidance wants (null, condition).

        A single null condition serves every condition of the other: it is expanded to their number. Where one of the
        two has repeats to spare, it is made to match the other.
        Raises ValueError when the layers, keys or numbers of pictures differ.
        """
        second.check_layers(first.layers)
        if first.columns.shape[1] != second.columns.shape[1]:
            raise ValueError(
                f"conditions of {first.columns.shape[1]} and {second.columns.shape[1]} keys cannot be in one batch"
            )
        count = max(first.columns.shape[0], second.columns.shape[0])
        repeats = max(first.repeats, second.repeats)
        for part in (first, second):
            if part.columns.shape[0] not in (1, count) or part.repeats not in (1, repeats):
                raise ValueError(
                    f"conditions for {first.columns.shape[0]} x {first.repeats} and {second.columns.shape[0]} x "
                    f"{second.repeats} pictures cannot be concatenated; each must have 1 or {count} conditions, "
                    f"repeated 1 or {repeats} times"
                )
        columns = torch.cat([part.columns.expand(count, -1, -1) for part in (first, second)])
        return DreamCondition(columns, first.layers, repeats)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> DreamCondition:
        return replace(self, columns=self.columns.to(device=device, dtype=dtype))

    def detach(self) -> DreamCondition:
        return replace(self, columns=self.columns.detach())

    def save(self, path: str | Path) -> None:
        """Writes the condition as safetensors (which must be installed); `load` reads it."""
        layers = [[layer.heads, layer.head_width] for layer in self.layers]
        header = {"format": _FORMAT, "layers": json.dumps(layers), "repeats": str(self.repeats)}
        _safetensors().save_file({"columns": self.columns.detach().contiguous()}, str(path), metadata=header)

    @staticmethod
    def load(path: str | Path, device: torch.device | str = "cpu") -> DreamCondition:
        """Reads what `save` wrote. Raises ValueError when the file holds something else."""
        with _safetensors().safe_open(str(path), framework="pt", device=str(device)) as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise ValueError(
                    f"{path} is not a condition (format {header.get('format')!r} instead of {_FORMAT!r}); "
                    "DreamCondition.save writes one"
                )
            layers = tuple(ConditionLayer(*layer) for layer in json.loads(header["layers"]))
            return DreamCondition(file.get_tensor("columns"), layers, int(header["repeats"]))


def _safetensors():
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("saving and loading conditions needs safetensors; pip install safetensors") from error

    class Both:
        save_file = staticmethod(safetensors.torch.save_file)
        safe_open = staticmethod(safetensors.safe_open)

    return Both


def project_states(states: Tensor, width: int, projector: Callable[[Tensor], Tensor] | Tensor | None = None) -> Tensor:
    """States [conditions, keys, any] brought to the width of a condition, as `condition_kv` does, with its errors."""
    if states.dim() != 3:
        raise ValueError(f"states {list(states.shape)} must be [conditions, keys, width]")
    if isinstance(projector, Tensor):
        if projector.dim() != 2 or projector.shape[1] != states.shape[-1]:
            raise ValueError(
                f"projector {list(projector.shape)} does not take states of width {states.shape[-1]}; "
                "needed is [condition width, width]"
            )
        projected = F.linear(states, projector)
    else:
        projected = states if projector is None else projector(states)
    if projected.dim() != 3 or projected.shape[-1] != width:
        raise ValueError(
            f"the condition {list(projected.shape)} must be [conditions, keys, {width}]; "
            + ("give a projector" if projector is None else "the projector belongs to another model")
        )
    return projected


def condition_kv(
    states: Tensor, weights: ConditionWeights, projector: Callable[[Tensor], Tensor] | Tensor | None = None
) -> DreamCondition:
    """Keys and values of every cross-attention layer from a model's states, in one grouped product.

    columns = projector(states) weights^T. One product over all layers' columns runs at the speed of a large matrix
    product, and its result is all layers' keys and values: each a view. In the backward the gradients of all layers
    are one matrix, too, so the states' gradient is one product; the weights are frozen.
    DreamLLM (Dong et al., 2024), section 3: the 64 dream states condition a frozen diffusion UNet.

    Args:
        states: [conditions, keys, width], such as the language model's final states at the dream queries.
        weights: of the UNet; dtype and device of the projected states.
        projector: maps the states to the width of the condition: a module, or the weight [condition width, width] of a
            linear layer without bias, or None when the states have that width already.

    Returns:
        The condition, differentiable with respect to the states and the projector's parameters.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    projected = project_states(states, weights.condition_width, projector)
    if projected.dtype != weights.weight.dtype and not torch.is_autocast_enabled(projected.device.type):
        raise ValueError(
            f"the condition has dtype {projected.dtype} but the weights have {weights.weight.dtype}; cast one of them"
        )
    if projected.device != weights.weight.device:
        raise ValueError(f"the condition is on {projected.device} but the weights are on {weights.weight.device}")
    return DreamCondition(weights.product(projected), weights.layers)
