"""The forwards of decoders with LLaMA's layout, over dreamkernels' operators.

Each takes the place of one class's forward on one instance and calls that instance's own submodules, so adapters,
quantised projections and hooks on them keep working. What differs from transformers is named where it differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dreamkernels.integrations.constant_prefix import ConstantPrefix
from dreamkernels.integrations.report import patched_by_us
from dreamkernels.nn import RMSNorm
from dreamkernels.ops import rotary, swiglu
from dreamkernels.products import linear_layer

norm_forward = RMSNorm.forward


@dataclass(frozen=True)
class RowsWanted:
    """The only positions, int64 [N], whose states the layer `last_layer` needs to return: [1, N, hidden].

    A decoder takes it as `rows_wanted` where its last layer and that layer's attention run the forwards of this module
    (`transformers.takes_rows`). The other positions give that layer their keys and values; their part of its output
    projection and MLP is not computed.
    """

    rows: Tensor
    last_layer: int

    def of(self, states: Tensor, layer: int) -> Tensor:
        return states[:, self.rows] if layer == self.last_layer else states


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer will read x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def add_and_norm(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """(norm(residual + x), residual + x), in one operator where the norm is ours and nobody watches it."""
    weight: Any = norm.weight
    fits = torch.promote_types(x.dtype, residual.dtype) == weight.dtype
    if patched_by_us(norm) and not has_hooks(norm) and fits:
        return norm_forward(norm, x, residual)  # type: ignore[arg-type, return-value]
    residual = residual + x
    return norm(residual), residual


def mlp_forward(self: Any, x: Tensor) -> Tensor:
    x = x.to(autocast_dtype(x))  # once, not once per projection
    gate, up = linear_layer(self.gate_proj, x), linear_layer(self.up_proj, x)
    return linear_layer(self.down_proj, swiglu(gate, up))


def attention_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    *,
    arguments: Callable[[Any], dict[str, Any]],
    eager: Callable[..., tuple[Tensor, Tensor | None]],
    rows_wanted: RowsWanted | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Rotates queries and keys in one operator. The attention itself stays what the configuration names.

    `arguments(self)` go to the attention as well (a family's sliding window); `eager` is the family's own attention.
    """
    x = hidden_states.to(autocast_dtype(hidden_states))  # once, not once per projection
    shape = x.shape[:-1]
    query, key, value = (
        linear_layer(p, x).view(*shape, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj)
    )
    query, key = rotate(query.transpose(1, 2), key.transpose(1, 2), *position_embeddings)
    value = value.transpose(1, 2)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, self.layer_idx)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
    output, weights = attend(
        self,
        query,
        key,
        value,
        attention_mask,
        dropout=self.attention_dropout if self.training else 0.0,
        scaling=self.scaling,
        **arguments(self),
        **kwargs,
    )
    output = output.reshape(*shape, -1)
    if rows_wanted is not None:
        output = rows_wanted.of(output, self.layer_idx)
    return linear_layer(self.o_proj, output.contiguous()), weights


def store_keys_and_values(
    self: Any, x: Tensor, position_embeddings: tuple[Tensor, Tensor], prefix: ConstantPrefix
) -> None:
    """What an attention module hands to `prefix`, without the attention itself. x [1, T, hidden]."""
    x = x.to(autocast_dtype(x))
    key, value = (linear_layer(p, x).view(*x.shape[:-1], -1, self.head_dim) for p in (self.k_proj, self.v_proj))
    key = key.transpose(1, 2)
    _, key = rotate(key, key, *position_embeddings)
    prefix.store(self.layer_idx, key[0].transpose(0, 1), value[0])


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    if cos.dtype != query.dtype:
        cos, sin = cos.float(), sin.float()
    return rotary(query, key, cos, sin)


def decoder_layer_forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    """Fuses the residual add after attention with the norm that follows it.

    Of the positions of a constant prefix the last layer computes keys and values only; its result is not read.
    """
    residual = hidden_states
    prefix = kwargs.get("constant_prefix")
    attention = self.self_attn
    if prefix is not None and prefix.ends_at(attention.layer_idx) and patched_by_us(attention):
        assert position_embeddings is not None
        store_keys_and_values(attention, self.input_layernorm(hidden_states), position_embeddings, prefix)
        return hidden_states
    hidden_states, _ = self.self_attn(
        hidden_states=self.input_layernorm(hidden_states),
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        **kwargs,
    )
    if (rows_wanted := kwargs.get("rows_wanted")) is not None:
        residual = rows_wanted.of(residual, attention.layer_idx)
    hidden_states, residual = add_and_norm(self.post_attention_layernorm, hidden_states, residual)
    return residual + self.mlp(hidden_states)


def checkpointed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Gradient checkpointing for a replaced layer forward: transformers puts it around the forward of the class."""

    def run(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        if self.gradient_checkpointing and self.training:
            # As transformers does: the recomputation would write to the cache a second time.
            kwargs.update({name: None for name in ("past_key_values",) if name in kwargs})
            kwargs.update({name: False for name in ("use_cache",) if name in kwargs})
            return self._gradient_checkpointing_func(partial(forward, self, **kwargs), *args)
        return forward(self, *args, **kwargs)

    return run
