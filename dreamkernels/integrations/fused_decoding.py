"""A whole decoder in one operator, on CPUs: one new position of each sequence over a key-value cache in pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from dreamkernels.integrations.llama_layout import has_hooks
from dreamkernels.integrations.paged_cache import CachedSequence, KeyValueCache
from dreamkernels.integrations.report import patched_by_us
from dreamkernels.ops import decode_layers, few_rows_linear
from dreamkernels.ops.decode_layers import WEIGHTS_OF_A_LAYER
from dreamkernels.ops.operator import FLOAT_DTYPES, choose


class FusedDecoder:
    """`decode_layers` on a decoder's own parameters: nothing is copied, and changed weights count at once.

    Raises ValueError where `why_not_fused` names an obstacle.
    """

    def __init__(self, decoder: Any, window: int | None) -> None:
        layers = decoder.layers
        if reason := why_not_fused(decoder):
            raise ValueError(f"{type(decoder).__name__} cannot run as one operator: {reason}")
        self._norms = [norm for layer in layers for norm in _norms(layer)] + [decoder.norm]
        self._linears = [linear for layer in layers for linear in _linears(layer)]
        self._parameters = [module._parameters for layer in layers for module in _modules(layer)]
        self._last: Any = decoder.norm
        self._eps: float = self._last.variance_epsilon
        self._scale: float = layers[0].self_attn.scaling
        self._window = window

    def runs(self, x: Tensor) -> bool:
        """Whether the operator computes what the modules would now: nobody watches them, their weights are plain."""
        if torch.is_autocast_enabled(x.device.type) or is_in_torch_dispatch_mode():
            return False
        if not all(map(patched_by_us, self._norms)) or any(map(has_hooks, self._linears + self._norms)):
            return False
        return all(is_plain(weight, x) for weight in (*self._weights(), self._last.weight))

    def advance(
        self, cache: KeyValueCache, sequences: Sequence[CachedSequence], x: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """Appends one embedding, a row of x [B, H], to each sequence; states after the final norm, [B, H]."""
        positions = torch.tensor([sequence.length for sequence in sequences], dtype=torch.int32)
        cache.extend(sequences, [1] * len(sequences))
        tables = cache.block_table(sequences)
        return decode_layers(
            x,
            self._weights(),
            self._last.weight,
            cache.keys_and_values,
            positions,
            tables,
            cos,
            sin,
            eps=self._eps,
            scale=self._scale,
            window=self._window,
        )

    def _weights(self) -> list[Any]:
        return [parameters["weight"] for parameters in self._parameters]


class FusedHead:
    """The product with a head's own weight, by an operator for few rows."""

    def __init__(self, head: nn.Module) -> None:
        self._head: Any = head

    def runs(self, x: Tensor) -> bool:
        head = self._head
        if type(head) is not nn.Linear or has_hooks(head) or torch.is_autocast_enabled(x.device.type):
            return False
        parameters = [head.weight] if head.bias is None else [head.weight, head.bias]
        return not is_in_torch_dispatch_mode() and all(is_plain(parameter, x) for parameter in parameters)

    def __call__(self, x: Tensor) -> Tensor:
        return few_rows_linear(x, self._head.weight, self._head.bias)


def is_plain(weight: Any, x: Tensor) -> bool:
    """Whether a kernel may read a parameter as memory: on a CPU, of the dtype of x, neither quantised nor sharded."""
    return type(weight) is nn.Parameter and weight.dtype == x.dtype and x.device.type == "cpu" == weight.device.type


def why_not_fused(decoder: Any) -> str:
    """Why a decoder that `CachedDecoder` takes cannot run as one operator, or ""."""
    if choose("decode_layers", "auto", "cpu") != "cpu":
        return "the compiled CPU library does not have the operator"
    linears = [linear for layer in decoder.layers for linear in _linears(layer)]
    for linear in linears:
        if type(linear) is not nn.Linear:
            return f"a projection is a {type(linear).__name__}, not a Linear"
        if linear.bias is not None:
            return "its projections have biases"
        if linear.weight.dtype not in FLOAT_DTYPES:
            return f"its weights are {linear.weight.dtype}"
        if not linear.weight.is_contiguous():
            return "a weight is not contiguous"
    norms = [norm for layer in decoder.layers for norm in _norms(layer)] + [decoder.norm]
    if any(not hasattr(norm, "variance_epsilon") for norm in norms) or len({n.variance_epsilon for n in norms}) > 1:
        return "its norms add different epsilons"
    if len({layer.self_attn.scaling for layer in decoder.layers}) > 1:
        return "its layers scale differently"
    return ""


def _norms(layer: Any) -> tuple[nn.Module, nn.Module]:
    return layer.input_layernorm, layer.post_attention_layernorm


def _linears(layer: Any) -> tuple[nn.Module, ...]:
    a, mlp = layer.self_attn, layer.mlp
    return a.q_proj, a.k_proj, a.v_proj, a.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj


def _modules(layer: Any) -> tuple[nn.Module, ...]:
    """In the order of the operator's weights."""
    first, second = _norms(layer)
    attention, mlp = _linears(layer)[:4], _linears(layer)[4:]
    modules = (first, *attention, second, *mlp)
    assert len(modules) == len(WEIGHTS_OF_A_LAYER)
    return modules
