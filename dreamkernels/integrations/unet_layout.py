"""What the blocks of diffusers' UNets, VAEs and ControlNets compute, over dreamkernels' operators.

Each `..._forward(plan, module, ...)` stands for the forward of one class of diffusers and takes its arguments. Products
go through the modules, so that adapters (LoRA) and hooks on them work; only layers that `plan.frozen` holds are taken
over with their residual.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.transformer_2d import Transformer2DModelOutput
from torch import Tensor, nn

from dreamkernels.conditioning import ConditionLayer, DreamCondition
from dreamkernels.frozen import FrozenConv2d, FrozenLinear, FrozenUpsample, version_of
from dreamkernels.integrations.diffusers_attention import DreamkernelsAttnProcessor
from dreamkernels.ops import attention, cross_conditioning, geglu, group_norm_silu, layer_norm
from dreamkernels.ops.cross_conditioning import MAX_KEYS

__all__ = ["Plan", "TimeShift"]


@dataclass(frozen=True)
class TimeShift:
    """The time embedding of one ResNet block after its projection: [1 or pictures, channels]."""

    shift: Tensor


@dataclass
class Plan:
    """What the blocks of one optimised model share.

    `frozen`: layers whose weights do not change. `merged`: the query, key and value projections of a self-attention as
    one product. `upsampled`: convolutions that follow a doubling of the picture. `layer_numbers` and `layers`: a UNet's
    cross-attention layers, in the order in which they run.
    `time_projection`: all ResNet blocks' time projections as one product. `condition_projection`: all
    cross-attention layers' keys and values as one. `unet_obstacle`: why the UNet keeps its own forward.
    """

    owner: nn.Module | None = None  # the model; a copy of it shares the plan
    frozen: dict[nn.Module, FrozenLinear | FrozenConv2d] = field(default_factory=dict)
    merged: dict[nn.Module, FrozenLinear] = field(default_factory=dict)
    upsampled: dict[nn.Module, FrozenUpsample] = field(default_factory=dict)
    layer_numbers: dict[nn.Module, int] = field(default_factory=dict)
    caches: dict[nn.Module, ConditionCache] = field(default_factory=dict)
    layers: tuple[ConditionLayer, ...] | None = None
    unet_obstacle: str = ""
    time_projection: FrozenLinear | None = None
    condition_projection: FrozenLinear | None = None

    def add(self, module: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
        """module(x) + residual."""
        frozen = self.frozen.get(module)
        return module(x) + residual if frozen is None or hooked(module) else frozen(x, residual)


def hooked(module: nn.Module) -> bool:
    """Whether a call of the module does more than its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def doubled(x: Tensor, pictures: int) -> Tensor:
    """x for twice as many pictures: both halves of a guided batch share what comes before the first condition."""
    return x if x.shape[0] == pictures else torch.cat([x, x])


# -- ResNet blocks -----------------------------------------------------------------------------------------------------


def group_norm(module: nn.GroupNorm, x: Tensor, activation: str, shift: Tensor | None = None) -> Tensor:
    if shift is not None and shift.shape[0] != x.shape[0]:
        shift = shift.expand(x.shape[0], -1) if shift.shape[0] == 1 else doubled(shift, x.shape[0])
    weight, bias, shift = (None if part is None else part.to(x.dtype) for part in (module.weight, module.bias, shift))
    return group_norm_silu(x, module.num_groups, weight, bias, module.eps, activation, shift)


def group_norm_forward(plan: Plan, module: nn.GroupNorm, input: Tensor) -> Tensor:
    return group_norm(module, input, "none")


def group_norm_silu_forward(plan: Plan, module: nn.GroupNorm, input: Tensor) -> Tensor:
    return group_norm(module, input, "silu")


def identity_forward(plan: Plan, module: nn.Module, input: Tensor) -> Tensor:
    return input


def layer_norm_forward(plan: Plan, module: nn.LayerNorm, input: Tensor) -> Tensor:
    weight, bias = (None if part is None else part.to(input.dtype) for part in (module.weight, module.bias))
    return layer_norm(input, weight, bias, module.eps)


def resnet_forward(
    plan: Plan, module: Any, input_tensor: Tensor, temb: Tensor | TimeShift | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """ResnetBlock2D: the time embedding is added inside the second norm, the input inside the second convolution."""
    hidden = group_norm(module.norm1, input_tensor, "silu")
    resample = module.upsample if module.upsample is not None else module.downsample
    if resample is not None:
        input_tensor, hidden = resample(input_tensor), resample(hidden)
    hidden = module.conv1(hidden)
    shift = None
    if isinstance(temb, TimeShift):
        shift = temb.shift
    elif module.time_emb_proj is not None and temb is not None:
        shift = module.time_emb_proj(temb if module.skip_time_act else module.nonlinearity(temb))
    hidden = module.dropout(group_norm(module.norm2, hidden, "silu", shift))
    residual = input_tensor if module.conv_shortcut is None else module.conv_shortcut(input_tensor)
    output = plan.add(module.conv2, hidden, residual)
    return output if module.output_scale_factor == 1 else output / module.output_scale_factor


# -- transformer blocks ------------------------------------------------------------------------------------------------


def transformer_forward(
    plan: Plan,
    module: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Any = None,
    timestep: Tensor | None = None,
    added_cond_kwargs: Any = None,
    class_labels: Any = None,
    cross_attention_kwargs: Any = None,
    attention_mask: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    return_dict: bool = True,
) -> Any:
    """Transformer2DModel: channels-last pictures are sequences already, so nothing is copied around the blocks."""
    masked = attention_mask is not None or encoder_attention_mask is not None
    if masked or cross_attention_kwargs or (torch.is_grad_enabled() and module.gradient_checkpointing):
        return type(module).forward(
            module,
            hidden_states,
            _tensor_condition(encoder_hidden_states, "attention masks") if masked else encoder_hidden_states,
            timestep,
            added_cond_kwargs,
            class_labels,
            cross_attention_kwargs,
            attention_mask,
            encoder_attention_mask,
            return_dict,
        )  # fmt: skip
    pictures = hidden_states.contiguous(memory_format=torch.channels_last)
    x = _project_in(module, module.norm(pictures))
    for block in module.transformer_blocks:
        x = block(x, encoder_hidden_states=encoder_hidden_states)
    output = _project_out(plan, module, x, pictures)
    if not return_dict:
        return (output,)
    return Transformer2DModelOutput(sample=output)


def _sequence(pictures: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h * w, C], a view of channels-last pictures."""
    return pictures.permute(0, 2, 3, 1).flatten(1, 2)


def _pictures(sequence: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_sequence` for pictures of that height and width."""
    return sequence.unflatten(1, shape).permute(0, 3, 1, 2)


def _project_in(module: Any, pictures: Tensor) -> Tensor:
    """proj_in on sequences: a linear layer, or (SD 1.5) a convolution of one pixel on the picture that they are."""
    if module.use_linear_projection:
        return module.proj_in(_sequence(pictures))
    return _sequence(module.proj_in(pictures))


def _project_out(plan: Plan, module: Any, x: Tensor, pictures: Tensor) -> Tensor:
    """proj_out(x) + pictures, again pictures [B, C, h, w]."""
    shape = pictures.shape[2:]
    residual = doubled(pictures, x.shape[0])
    if module.use_linear_projection:
        return _pictures(plan.add(module.proj_out, x, _sequence(residual)), shape)
    return plan.add(module.proj_out, _pictures(x, shape), residual)


def block_forward(
    plan: Plan,
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: Any = None,
    class_labels: Any = None,
    added_cond_kwargs: Any = None,
) -> Tensor:
    """BasicTransformerBlock with layer norms: self-attention, attention to the condition, gated feed-forward."""
    masked = attention_mask is not None or encoder_attention_mask is not None
    if masked or cross_attention_kwargs or module._chunk_size is not None:
        return type(module).forward(
            module,
            hidden_states,
            attention_mask,
            _tensor_condition(encoder_hidden_states, "attention masks, cross_attention_kwargs or chunks"),
            encoder_attention_mask,
            timestep,
            cross_attention_kwargs,
            class_labels,
            added_cond_kwargs,
        )
    x = _self_attention(plan, module.attn1, module.norm1(hidden_states), hidden_states)
    if module.attn2 is not None:
        x = _cross_attention(plan, module.attn2, module.norm2(x), encoder_hidden_states, x)
    return _feed_forward(plan, module.ff, module.norm3(x), x)


def _tensor_condition(condition: Any, what: str) -> Any:
    if isinstance(condition, DreamCondition):
        raise ValueError(f"a DreamCondition cannot be combined with {what}; give encoder_hidden_states as a tensor")
    return condition


def attends_plainly(module: Any) -> bool:
    """Whether an Attention computes softmax(q k^T) v of its projections and nothing else."""
    plain = type(module.processor) in (AttnProcessor2_0, DreamkernelsAttnProcessor)
    return plain and not (hooked(module) or (module.training and module.to_out[1].p > 0))


def _self_attention(plan: Plan, module: Any, x: Tensor, residual: Tensor) -> Tensor:
    if not attends_plainly(module):
        return module(x) + residual
    merged = plan.merged.get(module)
    if merged is None or any(type(part) is not nn.Linear or hooked(part) for part in projections(module)):
        q, k, v = (part(x).unflatten(2, (module.heads, -1)) for part in projections(module))
    else:
        q, k, v = merged(x).unflatten(2, (3, module.heads, -1)).unbind(2)
    return plan.add(module.to_out[0], attention(q, k, v, scale=module.scale).flatten(2), residual)


def projections(module: Any) -> tuple[Any, Any, Any]:
    return module.to_q, module.to_k, module.to_v


def _cross_attention(plan: Plan, module: Any, x: Tensor, condition: Any, residual: Tensor) -> Tensor:
    prepared = isinstance(condition, DreamCondition)
    if not attends_plainly(module):
        condition = _tensor_condition(condition, f"a {type(module.processor).__name__}")
        pictures = condition.shape[0]
        return module(doubled(x, pictures), encoder_hidden_states=condition) + doubled(residual, pictures)
    q = module.to_q(x).unflatten(2, (module.heads, -1))
    if not prepared:
        k, v = plan.caches.setdefault(module, ConditionCache()).key_value(module, condition)
    else:
        if module not in plan.layer_numbers:
            raise ValueError("this is a copy of an optimised UNet, which takes no DreamCondition; optimise the copy")
        k, v = condition.key_value(plan.layer_numbers[module])
    pictures = condition.pictures if prepared else condition.shape[0]
    if pictures == 2 * q.shape[0]:
        q, residual = torch.cat([q, q]), doubled(residual, pictures)
    attend = cross_conditioning if 1 <= k.shape[1] <= MAX_KEYS else attention
    out = attend(q, k, v, scale=module.scale)
    return plan.add(module.to_out[0], out.flatten(2), residual)


def _feed_forward(plan: Plan, module: Any, x: Tensor, residual: Tensor) -> Tensor:
    gate, dropout, out, *rest = module.net
    if type(gate) is not GEGLU or rest or hooked(module):
        return module(x) + residual
    return plan.add(out, dropout(gate(x)), residual)


def frozen_forward(plan: Plan, module: nn.Module, input: Tensor) -> Tensor:
    frozen = plan.frozen.get(module)  # none for a copy of the module
    return type(module).forward(module, input) if frozen is None else frozen(input)


def upsample_forward(
    plan: Plan, module: Any, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any
) -> Tensor:
    """Upsample2D: doubled by repetition, and convolved."""
    doubled_size = tuple(2 * side for side in hidden_states.shape[2:])
    other_size = output_size is not None and tuple(output_size) != doubled_size
    if other_size or module.conv not in plan.upsampled or hooked(module.conv):
        return type(module).forward(module, hidden_states, output_size, *args, **kwargs)
    return plan.upsampled[module.conv](hidden_states)


def geglu_forward(plan: Plan, module: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return geglu(module.proj(hidden_states))


# -- keys and values of a condition that stays -------------------------------------------------------------------------


class ConditionCache:
    """Keys and values of one cross-attention layer, kept while the same condition tensor comes again.

    A pipeline hands the same tensor to the UNet in every step. It is recognised by identity and version, and so are the
    weights with their adapters; where a gradient is needed nothing is kept.
    """

    def __init__(self) -> None:
        self._states: weakref.ref[Tensor] | None = None
        self._key: tuple = ()
        self._kept: tuple[Tensor, Tensor] | None = None

    def key_value(self, attn: Any, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Q, heads, head width] of states [B, Q, C]."""
        if torch.is_grad_enabled() and (states.requires_grad or any(p.requires_grad for p in _parameters(attn))):
            return _key_value(attn, states)
        if torch.compiler.is_compiling():
            return _key_value(attn, states)
        modes = torch.is_autocast_enabled(states.device.type), torch.is_inference_mode_enabled()
        key = (version_of(states), modes, *map(_fingerprint, (attn.to_k, attn.to_v)))
        if self._kept is None or self._states is None or self._states() is not states or self._key != key:
            self._kept = _key_value(attn, states)
            self._states, self._key = weakref.ref(states, self._forget), key
        return self._kept

    def _forget(self, reference: Any) -> None:
        if self._states is reference:
            self.clear()

    def clear(self) -> None:
        self._states, self._key, self._kept = None, (), None


def _key_value(attn: Any, states: Tensor) -> tuple[Tensor, Tensor]:
    k, v = (part(states).unflatten(2, (attn.heads, -1)) for part in (attn.to_k, attn.to_v))
    return k, v


def _parameters(attn: Any) -> Any:
    yield from attn.to_k.parameters()
    yield from attn.to_v.parameters()


def _fingerprint(module: Any) -> tuple:
    """Changes when a projection is replaced or its parameters are written to; or when peft's adapters are set."""
    if type(module) is nn.Linear:
        return id(module), version_of(module.weight)
    parts = tuple(map(version_of, module.parameters()))
    adapters = tuple(
        str(getattr(module, name, None))
        for name in ("scaling", "merged_adapters", "active_adapters", "disable_adapters")
    )
    return id(module), parts, adapters
