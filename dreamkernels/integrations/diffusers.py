"""diffusers models over dreamkernels' operators: UNets of Stable Diffusion 1.5, 2.1 and XL, ControlNets and VAEs.

    report = optimize(pipeline)          # or a UNet2DConditionModel, AutoencoderKL, ControlNetModel, or what holds them
    print(report)
    report.undo()

Instances are changed, never classes. Parameters and their names, `state_dict`, adapters (LoRA) and gradients stay.
An optimised UNet2DConditionModel also takes what diffusers' own cannot:

    condition = report.condition(states)                  # keys and values of all layers, once per picture
    table = report.time_table(scheduler.timesteps)        # all blocks' time embeddings, once per schedule
    guided = DreamCondition.concatenate(null, condition)
    for step in range(len(table)):                        # latents once: both halves share what comes before the
        both = unet(latents, table[step], guided).sample  # first cross-attention; `both` is [unguided | guided]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

try:
    import diffusers
    from diffusers.models.activations import GEGLU
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.attention_processor import Attention
    from diffusers.models.autoencoders.vae import Decoder, Encoder
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.models.upsampling import Upsample2D
except ImportError as error:
    raise ImportError(
        "dreamkernels.integrations.diffusers needs diffusers: pip install 'dreamkernels[dreamllm]'"
    ) from error

from dreamkernels.conditioning import ConditionLayer, ConditionWeights, DreamCondition, condition_kv, project_states
from dreamkernels.frozen import FrozenConv2d, FrozenLinear, FrozenUpsample, why_not_frozen, why_not_packed
from dreamkernels.integrations import unet_forward as unets
from dreamkernels.integrations import unet_layout as layout
from dreamkernels.integrations.report import Report, patched_by_us
from dreamkernels.integrations.unet_layout import Plan
from dreamkernels.ops.operator import FLOAT_DTYPES

__all__ = ["DiffusersReport", "optimize"]

MODELS = (diffusers.UNet2DConditionModel, diffusers.AutoencoderKL, diffusers.ControlNetModel)


@dataclass
class DiffusersReport(Report):
    """What `optimize` replaced; for a UNet also what prepares its inputs."""

    _plans: dict[nn.Module, Plan] = field(default_factory=dict, repr=False)

    def condition(
        self, states: Tensor, projector: Callable[[Tensor], Tensor] | Tensor | None = None, unet: Any = None
    ) -> DreamCondition:
        """Keys and values of all cross-attention layers of a UNet from states [conditions, keys, width].

        `projector` and gradients as in `dreamkernels.condition_kv`. With adapters on the key and value projections, the
        projections are called one by one. `unet`: which, if several were optimised.

        Raises:
            ValueError: no UNet was optimised, it has no layers that take a common condition, or shapes do not fit.
        """
        unet, plan = self._unet(unet)
        if plan.layers is None:
            raise ValueError(f"this UNet takes no DreamCondition: {plan.unet_obstacle or 'it has no cross-attention'}")
        modules: list[Any] = list(plan.layer_numbers)
        states = project_states(states, modules[0].cross_attention_dim, projector)
        if all(_plain_projections(module) for module in modules):
            if plan.condition_projection is not None:
                return DreamCondition(plan.condition_projection(states), plan.layers)
            parts = [(module.to_k.weight, module.to_v.weight, module.heads) for module in modules]
            if not any(key.requires_grad or value.requires_grad for key, value, _ in parts):
                return condition_kv(states, ConditionWeights.concatenate(parts))
        columns = [part(states) for module in modules for part in (module.to_k, module.to_v)]
        return DreamCondition(torch.cat(columns, dim=-1), plan.layers)

    def time_table(self, timesteps: Tensor, unet: Any = None) -> unets.TimeTable:
        """The time embeddings of all ResNet blocks for timesteps [steps]; `unet(latents, table[i], condition)`.

        Raises:
            ValueError: the embedding depends on more than the time (SD XL), or no UNet was optimised.
        """
        unet, plan = self._unet(unet)
        if plan.unet_obstacle:
            raise ValueError(f"this UNet takes no time table: {plan.unet_obstacle}")
        return unets.time_table(unet, timesteps)

    def takes_conditions(self, unet: Any) -> bool:
        """Whether a UNet that was optimised takes a `DreamCondition` now: other attention processors do not."""
        plan = self._plans.get(unet)
        return plan is not None and plan.layers is not None and all(map(layout.attends_plainly, plan.layer_numbers))

    def takes_time_tables(self, unet: Any) -> bool:
        """Whether a UNet that was optimised takes the rows of a `TimeTable`."""
        return unet in self._plans and not (self._plans[unet].unet_obstacle or unets.why_not_tabulated(unet))

    def refresh(self) -> None:
        """Forgets everything that was kept from weights: packed layers, merged projections, cached keys and values.

        Only a change through `.data` or shared memory needs it; other changes are noticed.
        """
        for plan in self._plans.values():
            joined = (plan.time_projection, plan.condition_projection)
            for layer in (*plan.frozen.values(), *plan.upsampled.values(), *plan.merged.values(), *joined):
                if layer is not None:
                    layer.refresh()
            for cache in plan.caches.values():
                cache.clear()

    def _unet(self, unet: Any) -> tuple[Any, Plan]:
        found = [model for model in self._plans if isinstance(model, diffusers.UNet2DConditionModel)]
        if unet is None and len(found) == 1:
            unet = found[0]
        if unet not in self._plans:
            if unet is not None:
                raise ValueError("this UNet was not optimised by the call that made this report")
            advice = "; name one with unet=" if found else ""
            raise ValueError(f"{len(found)} UNets were optimised{advice}")
        return unet, self._plans[unet]


def optimize(
    model: Any,
    *,
    channels_last: bool = True,
    group_norm_silu: bool = True,
    layer_norm: bool = True,
    geglu: bool = True,
    attention: bool = True,
    frozen: bool = False,
) -> DiffusersReport:
    """Makes diffusers' UNets, ControlNets and VAEs use the operators, wherever they are in a model or pipeline.

    Args:
        model: a UNet2DConditionModel, AutoencoderKL or ControlNetModel, any module that contains some, or a
            DiffusionPipeline.
        channels_last: keeps convolution weights and pictures in torch.channels_last.
        group_norm_silu: group norms run `dreamkernels.group_norm_silu`, in ResNet blocks with the time embedding and
            the activation in it.
        layer_norm: layer norms run `dreamkernels.layer_norm`.
        geglu: gated feed-forwards run `dreamkernels.geglu`.
        attention: transformer blocks run `dreamkernels.attention` and `dreamkernels.cross_conditioning`; keys and
            values of a condition are kept while the same tensor is given. A layer with another attention processor
            than PyTorch's (an IP-Adapter's, say) keeps it.
        frozen: the weights do not change while the model is optimised. Query, key and value projections are merged,
            and on CPU linear layers and convolutions keep their weights in oneDNN's layout, twice when a gradient is
            taken. It costs memory for these copies. A weight that is written to is noticed, but not through `.data`:
            see `DiffusersReport.refresh`. Parameters that require a gradient are left alone.

    Returns:
        A report of what was replaced and what was left and why, with `undo()`. It is a context manager.

    Raises:
        ValueError: the model, or a part of it, is optimised already.
    """
    roots = dict(_models(model))
    already = [name for root in roots.values() for name, module in root.named_modules() if patched_by_us(module)]
    if already:
        raise ValueError(
            f"{already[0] or 'the model'} and {len(already) - 1} more modules are optimised already; "
            "call undo() of the report that did it, or keep it"
        )
    report = DiffusersReport()
    options = {
        "group_norm_silu": group_norm_silu,
        "layer_norm": layer_norm,
        "geglu": geglu,
        "attention": attention,
    }
    for prefix, root in roots.items():
        _Optimizer(report, prefix, root, options, frozen).run(channels_last)
    if not roots:
        report.left[""] = f"{type(model).__name__} contains no " + ", ".join(kind.__name__ for kind in MODELS)
    return report


def _models(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The UNets, VAEs and ControlNets in a module or a pipeline, by name."""
    if isinstance(model, diffusers.DiffusionPipeline):
        for name, component in model.components.items():
            if isinstance(component, nn.Module):
                yield from ((f"{name}.{inner}".rstrip("."), found) for inner, found in _models(component))
        return
    if not isinstance(model, nn.Module):
        raise ValueError(f"optimize takes a module or a DiffusionPipeline, not a {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, MODELS):
            yield name, module


def _plain_projections(module: Any) -> bool:
    return all(
        type(part) is nn.Linear and part.bias is None and not layout.hooked(part) for part in (module.to_k, module.to_v)
    )


class _Optimizer:
    """Goes through one model."""

    def __init__(self, report: DiffusersReport, prefix: str, root: Any, options: dict[str, bool], frozen: bool) -> None:
        self.report, self.prefix, self.root, self.options, self.frozen = report, prefix, root, options, frozen
        self.plan = Plan(root)
        report._plans[root] = self.plan

    def run(self, channels_last: bool) -> None:
        if channels_last:
            self._to_channels_last()
        if self.frozen:
            self._freeze()
        for name, module in list(self.root.named_modules()):
            recognised = self._recognise(module)
            if recognised is None or patched_by_us(module):
                continue
            option, forward, operator = recognised
            if reason := self._obstacle(module, option):
                self.report.left[self._name(name)] = reason
            else:
                self._patch(name, module, forward, operator)
        if isinstance(self.root, diffusers.UNet2DConditionModel):
            self._take_unet()

    def _name(self, name: str) -> str:
        return ".".join(part for part in (self.prefix, name) if part)

    def _patch(self, name: str, module: nn.Module, forward: Callable[..., Any], operator: str) -> None:
        self.report.patch(self._name(name), module, partial(forward, self.plan), operator)

    def _recognise(self, module: Any) -> tuple[str, Callable[..., Any], str] | None:
        """The option, the forward and the operators of a class that we know; exactly that class, none derived."""
        kind = type(module)
        if kind is ResnetBlock2D:
            return "group_norm_silu", layout.resnet_forward, "group_norm_silu"
        if kind is nn.GroupNorm:
            return "group_norm_silu", layout.group_norm_forward, "group_norm_silu"
        if kind is nn.LayerNorm:
            return "layer_norm", layout.layer_norm_forward, "layer_norm"
        if kind is GEGLU:
            return "geglu", layout.geglu_forward, "geglu"
        if kind is Transformer2DModel:
            return "attention", layout.transformer_forward, "channels-last sequences"
        if kind is BasicTransformerBlock:
            return "attention", layout.block_forward, "attention, cross_conditioning"
        if kind in (Encoder, Decoder) or kind is diffusers.UNet2DConditionModel:
            self._take_last_norm(module)
        return None

    def _take_last_norm(self, module: Any) -> None:
        """The norm and the activation before the last convolution: the norm does both, the activation nothing."""
        norm: Any = getattr(module, "conv_norm_out", None)
        activation: Any = getattr(module, "conv_act", None)
        fits = type(norm) is nn.GroupNorm and type(activation) is nn.SiLU and "forward" not in norm.__dict__
        if fits and not self._obstacle(norm, "group_norm_silu"):
            names = {id(found): name for name, found in self.root.named_modules()}
            self._patch(names[id(norm)], norm, layout.group_norm_silu_forward, "group_norm_silu")
            self._patch(names[id(activation)], activation, layout.identity_forward, "done by the norm before it")

    def _obstacle(self, module: Any, option: str) -> str:
        """Why a module of a known class has to keep its own code, or ""."""
        if "forward" in module.__dict__:
            return "its forward was replaced on the instance already"
        if not self.options[option]:
            return f"{option}=False"
        for name, parameter in module.named_parameters():
            if parameter.is_floating_point() and parameter.dtype not in FLOAT_DTYPES:
                return f"{name} is {parameter.dtype}; the operators take float32, bfloat16 and float16"
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
            return f"it normalises {len(module.normalized_shape)} dimensions"
        special = {ResnetBlock2D: _resnet_obstacle, Transformer2DModel: _transformer_obstacle}
        special[BasicTransformerBlock] = _block_obstacle
        return special[type(module)](module) if type(module) in special else ""

    def _to_channels_last(self) -> None:
        changed = [p for p in self.root.parameters() if p.dim() == 4 and p.is_contiguous() and min(p.shape[1:]) >= 1]
        for parameter in changed:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        if changed:
            self.report.on_undo(lambda: _to_contiguous(changed))

    def _freeze(self) -> None:
        for name, module in self.root.named_modules():
            if type(module) not in (nn.Linear, nn.Conv2d):
                continue
            reason = why_not_frozen(module) or why_not_packed(module)
            if reason or "forward" in module.__dict__:
                self.report.left[self._name(name)] = reason or "its forward was replaced on the instance already"
                continue
            frozen = FrozenConv2d(module) if isinstance(module, nn.Conv2d) else FrozenLinear(module)
            self.plan.frozen[module] = frozen
            self._patch(name, module, layout.frozen_forward, "weights in oneDNN's layout")
        for name, module in self.root.named_modules():
            if type(module) is Upsample2D and (convolution := self._after_doubling(module)) is not None:
                self.plan.upsampled[convolution] = FrozenUpsample(convolution)
                self._patch(name, module, layout.upsample_forward, "4 products for 9 (2x2 kernels)")
        if not self.options["attention"]:
            return
        for module in self.root.modules():
            if type(module) is BasicTransformerBlock and isinstance(module.attn1, Attention):
                projections = layout.projections(module.attn1)
                if not any(why_not_frozen(part) for part in projections):
                    self.plan.merged[module.attn1] = FrozenLinear(*projections)

    def _after_doubling(self, module: Any) -> Any:
        """The convolution of an Upsample2D that only doubles and convolves, or None."""
        convolution = module.conv
        plain = module.use_conv and module.interpolate and not module.use_conv_transpose and module.norm is None
        if not plain or convolution not in self.plan.frozen or "forward" in module.__dict__:
            return None
        kernel = (convolution.kernel_size, convolution.padding, convolution.stride)
        return convolution if kernel == ((3, 3), (1, 1), (1, 1)) else None

    def _take_unet(self) -> None:
        unet: Any = self.root
        plan = self.plan
        taken = self.options["attention"] and self.options["group_norm_silu"]
        plan.unet_obstacle = unets.why_not_walked(unet) if taken else "attention=False or group_norm_silu=False"
        blocks: list[Any] = list(unets.transformer_blocks_in_order(unet))
        if unpatched := next((block for block in blocks if not patched_by_us(block)), None):
            plan.unet_obstacle = plan.unet_obstacle or f"a {type(unpatched).__name__} keeps its own code"
        if plan.unet_obstacle:
            self.report.left[self._name("")] = plan.unet_obstacle
            return
        layers: list[Any] = [block.attn2 for block in blocks if block.attn2 is not None]
        plan.layer_numbers = {module: number for number, module in enumerate(layers)}
        plan.layers = tuple(ConditionLayer(module.heads, module.inner_dim // module.heads) for module in layers) or None
        resnets: list[Any] = list(unets.resnets_in_order(unet))
        projections = [resnet.time_emb_proj for resnet in resnets]
        activated = all(not resnet.skip_time_act and type(resnet.nonlinearity) is nn.SiLU for resnet in resnets)
        if self.frozen and activated and not any(map(why_not_frozen, projections)):
            plan.time_projection = FrozenLinear(*projections)
        keys_values = [part for module in layers for part in (module.to_k, module.to_v)]
        widths = {getattr(part, "in_features", None) for part in keys_values}
        joinable = len(widths) == 1 and all(_plain_projections(module) for module in layers)
        if self.frozen and joinable and not any(map(why_not_frozen, keys_values)):
            plan.condition_projection = FrozenLinear(*keys_values)
        self._patch("", unet, unets.unet_forward, "conditions and time tables, shared guided prefix")


def _to_contiguous(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.data = parameter.data.contiguous()


def _resnet_obstacle(module: Any) -> str:
    if type(module.nonlinearity) is not nn.SiLU:
        return f"its activation is {type(module.nonlinearity).__name__}, not SiLU"
    if module.time_emb_proj is not None and module.time_embedding_norm != "default":
        return f"its time embedding is used as {module.time_embedding_norm}"
    if type(module.norm1) is not nn.GroupNorm or type(module.norm2) is not nn.GroupNorm:
        return "its norms are not GroupNorm"
    return ""


def _transformer_obstacle(module: Any) -> str:
    return "" if module.is_input_continuous else "its input is not a picture"


def _block_obstacle(module: Any) -> str:
    if module.norm_type != "layer_norm" or module.pos_embed is not None:
        return f"its norm is {module.norm_type}" + ("" if module.pos_embed is None else " with positions")
    if module.only_cross_attention or (module.attn2 is not None and getattr(module, "double_self_attention", False)):
        return "its attentions take other inputs than self and condition"
    if hasattr(module, "fuser"):
        return "it is gated (GLIGEN)"
    for name in ("attn1", "attn2"):
        part = getattr(module, name)
        if part is not None and (reason := _attention_obstacle(part)):
            return f"{name} {reason}"
    return ""


def _attention_obstacle(module: Any) -> str:
    if type(module) is not Attention:
        return f"is a {type(module).__name__}"
    extras = ("spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj")
    given = [name for name in extras if getattr(module, name, None) is not None and getattr(module, name) is not False]
    if given:
        return f"has {', '.join(given)}"
    if module.residual_connection or module.rescale_output_factor != 1:
        return "adds or rescales its input"
    width = module.inner_dim // module.heads
    return f"has heads of width {width}; the operators take up to 160" if width > 160 else ""
