"""transformers models over dreamkernels' operators: LLaMA, Qwen2 and Mistral.

    report = optimize(model)
    print(report)
    report.undo()

Instances are changed, never classes: another model in the same process keeps its code. Parameters, their names,
`state_dict`, `save_pretrained`, `generate`, gradient checkpointing and `torch.compile` stay as they are.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

try:
    import transformers
except ImportError as error:
    raise ImportError(
        "dreamkernels.integrations.transformers needs transformers 5: pip install 'dreamkernels[dreamllm]'"
    ) from error

from dreamkernels.integrations import llama_layout, transformers_attention
from dreamkernels.integrations.causal_lm import causal_lm_forward, fused_loss_obstacle
from dreamkernels.integrations.report import Report, patched_by_us
from dreamkernels.ops.operator import FLOAT_DTYPES

__all__ = ["Report", "RowsWanted", "optimize", "takes_rows"]

RowsWanted = llama_layout.RowsWanted


@dataclass(frozen=True)
class Family:
    """`prefix`: of its classes in transformers.models.<model_type>.modeling_<model_type>.

    `attention_arguments`: what its attention modules hand to the attention beyond LLaMA's arguments.
    """

    prefix: str
    attention_arguments: Callable[[Any], dict[str, Any]] = lambda module: {}


FAMILIES = {
    "llama": Family("Llama"),
    "qwen2": Family("Qwen2", lambda module: {"sliding_window": module.sliding_window}),
    "mistral": Family("Mistral", lambda module: {"sliding_window": getattr(module.config, "sliding_window", None)}),
}
"""By model_type."""


@dataclass(frozen=True)
class Kind:
    """One replaceable class of a family. `parameters` is the signature of the forward that ours stands for."""

    option: str
    operator: str
    parameters: tuple[str, ...]


KINDS = {
    "RMSNorm": Kind("rms_norm", "rms_norm", ("hidden_states",)),
    "DecoderLayer": Kind(
        "rms_norm",
        "residual add in rms_norm",
        (
            "hidden_states",
            "attention_mask",
            "position_ids",
            "past_key_values",
            "use_cache",
            "position_embeddings",
            "kwargs",
        ),
    ),
    "Attention": Kind(
        "rotary",
        "rotary",
        ("hidden_states", "position_embeddings", "attention_mask", "past_key_values", "kwargs"),
    ),
    "MLP": Kind("swiglu", "swiglu", ("x",)),
    "ForCausalLM": Kind(
        "linear_cross_entropy",
        "linear_cross_entropy",
        (
            "input_ids",
            "attention_mask",
            "position_ids",
            "past_key_values",
            "inputs_embeds",
            "labels",
            "use_cache",
            "logits_to_keep",
            "kwargs",
        ),
    ),
}


def optimize(
    model: nn.Module,
    *,
    rms_norm: bool = True,
    rotary: bool = True,
    swiglu: bool = True,
    linear_cross_entropy: bool = True,
    attention: str | None = None,
) -> Report:
    """Makes LLaMA, Qwen2 and Mistral decoders use the operators, wherever they are in a model.

    Projections of attention modules and MLPs that are replaced run `dreamkernels.products.linear`.

    Args:
        model: any module that contains such a decoder: a `...ForCausalLM`, a `...Model`, or a larger model.
        rms_norm: RMSNorm modules run `dreamkernels.rms_norm`; in decoder layers it also does the residual add.
        rotary: attention modules rotate queries and keys by `dreamkernels.rotary`, with any type of RoPE.
        swiglu: MLPs with SiLU run `dreamkernels.swiglu`.
        linear_cross_entropy: a ...ForCausalLM that is given `labels` in training mode takes its loss from
            `dreamkernels.linear_cross_entropy`. It then computes no logits: `output.logits` is None. In eval mode, and
            with `skip_logits=False` in the call, it computes them and the loss as before; `skip_logits=True` leaves
            them out in eval mode too. Where every label is ignored the loss is 0, not NaN. Worth most with large
            vocabularies.
        attention: a name known to transformers' `AttentionInterface`, set by `set_attn_implementation`; None keeps the
            model's. "dreamkernels" is `dreamkernels.attention` (see `transformers_attention`: no attention weights can
            be asked for, and padding runs torch's attention with a warning).

    Returns:
        A report of what was replaced and what was left and why, with `undo()`. It is a context manager.

    Raises:
        ValueError: the model, or a part of it, is optimised already, or transformers does not know `attention`.
    """
    already = [name for name, module in model.named_modules() if patched_by_us(module)]
    if already:
        raise ValueError(
            f"{already[0] or 'the model'} and {len(already) - 1} more modules are optimised already; "
            "call undo() of the report that did it, or keep it"
        )
    options = {
        "rms_norm": rms_norm,
        "rotary": rotary,
        "swiglu": swiglu,
        "linear_cross_entropy": linear_cross_entropy,
    }
    report = Report()
    if attention is not None:
        _set_attention(model, attention, report)
    for name, module in model.named_modules():
        found = recognise(module)
        if found is None:
            continue
        kind, cls = found
        if reason := obstacle(module, kind, cls, options):
            report.left[name] = reason
        else:
            report.patch(name, module, forward_for(module, kind, cls), KINDS[kind].operator)
    if not report.replaced and not report.left:
        known = ", ".join(f"{family.prefix}Model" for family in FAMILIES.values())
        report.left[""] = f"{type(model).__name__} contains no {known}"
    return report


def takes_rows(decoder: nn.Module) -> bool:
    """Whether a decoder takes the argument `rows_wanted`, a `RowsWanted`, and returns the states of these rows only."""
    last: Any = decoder.layers[-1]  # type: ignore[index, union-attr]
    return patched_by_us(last) and patched_by_us(last.self_attn)


def recognise(module: nn.Module) -> tuple[str, type] | None:
    """The kind of a module and the transformers class that makes it one; a class derived from it counts."""
    for cls in type(module).__mro__:
        for model_type, family in FAMILIES.items():
            kind = cls.__name__.removeprefix(family.prefix)
            if kind in KINDS and cls.__module__ == f"transformers.models.{model_type}.modeling_{model_type}":
                return kind, cls
    return None


def obstacle(module: nn.Module, kind: str, cls: type, options: dict[str, bool]) -> str:
    """Why a module of a known kind has to keep its own code, or ""."""
    wanted = KINDS[kind]
    if not options[wanted.option]:
        return f"{wanted.option}=False"
    if "forward" in module.__dict__ and getattr(module.forward, "__func__", None) is not type(module).forward:
        return "its forward was replaced on the instance already (by a hook or another library)"
    if inspect.unwrap(type(module).forward) is not inspect.unwrap(cls.forward):  # type: ignore[attr-defined]
        return f"{type(module).__name__} overrides the forward of {cls.__name__}"
    parameters = tuple(inspect.signature(cls.forward).parameters)[1:]  # type: ignore[attr-defined]
    if parameters != wanted.parameters:
        return f"{cls.__name__}.forward takes ({', '.join(parameters)}) in this transformers, unlike the one known here"
    return OBSTACLES[kind](module) if kind in OBSTACLES else ""


def _dtype_obstacle(module: Any) -> str:
    """Packed integers of quantised layers are fine: they multiply in one of the dtypes that the operators take."""
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and parameter.dtype not in FLOAT_DTYPES:
            return f"{name} is {parameter.dtype}; the operator takes float32, bfloat16 and float16"
    return ""


def _mlp_obstacle(module: Any) -> str:
    activation = module.config.hidden_act
    return _dtype_obstacle(module) if activation in ("silu", "swish") else f"its activation is {activation}, not silu"


OBSTACLES: dict[str, Callable[[Any], str]] = {
    "RMSNorm": _dtype_obstacle,
    "Attention": _dtype_obstacle,
    "MLP": _mlp_obstacle,
    "ForCausalLM": fused_loss_obstacle,
}


FORWARDS: dict[str, Callable[..., Any]] = {
    "RMSNorm": llama_layout.norm_forward,
    "DecoderLayer": llama_layout.checkpointed(llama_layout.decoder_layer_forward),
    "MLP": llama_layout.mlp_forward,
    "ForCausalLM": causal_lm_forward,
}


def forward_for(module: Any, kind: str, cls: type) -> Callable[..., Any]:
    """The function that takes the place of the forward of a module of this kind."""
    if kind == "Attention":
        modeling = sys.modules[cls.__module__]
        family = FAMILIES[cls.__module__.split(".")[2]]
        return partial(
            llama_layout.attention_forward,
            arguments=family.attention_arguments,
            eager=modeling.eager_attention_forward,  # type: ignore[attr-defined]
        )
    return FORWARDS[kind]


def _set_attention(model: Any, name: str, report: Report) -> None:
    if not isinstance(model, transformers.PreTrainedModel):
        raise ValueError(
            f"attention={name!r} needs a transformers model, not {type(model).__name__}; optimise its parts"
        )
    if name == transformers_attention.NAME:
        transformers_attention.register()
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    report.on_undo(lambda: model.set_attn_implementation(before))
    report.replaced["attention"] = f"{name} instead of {before}"
