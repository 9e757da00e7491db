"""transformers models over dreamkernels' operators: LLaMA, Qwen2 and Mistral.

    report = optimize(model)
    print(report)
    report.undo()

Instances are changed, never classes: another model in the same process keeps its code. Parameters, their names,
`state_dict`, `save_pretrained`, `generate`, gradient checkpointing and `torch.compile` stay as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "dreamkernels.integrations.transformers needs transformers 5: pip install 'dreamkernels[dreamllm]'"
    ) from error

from dreamkernels.integrations import llama_layout
from dreamkernels.integrations.report import Report, patched_by_us
from dreamkernels.ops.operator import FLOAT_DTYPES

__all__ = ["Report", "optimize"]

FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "mistral": "Mistral"}
"""model_type -> the prefix of its classes in transformers.models.<model_type>.modeling_<model_type>."""


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
}


def optimize(model: nn.Module, *, rms_norm: bool = True) -> Report:
    """Makes LLaMA, Qwen2 and Mistral decoders use the operators, wherever they are in a model.

    Args:
        model: any module that contains such a decoder: a `...ForCausalLM`, a `...Model`, or a larger model.
        rms_norm: RMSNorm modules run `dreamkernels.rms_norm`; in decoder layers it also does the residual add.

    Returns:
        A report of what was replaced and what was left and why, with `undo()`. It is a context manager.

    Raises:
        ValueError: the model, or a part of it, is optimised already.
    """
    already = [name for name, module in model.named_modules() if patched_by_us(module)]
    if already:
        raise ValueError(
            f"{already[0] or 'the model'} and {len(already) - 1} more modules are optimised already; "
            "call undo() of the report that did it, or keep it"
        )
    options = {"rms_norm": rms_norm}
    report = Report()
    for name, module in model.named_modules():
        found = recognise(module)
        if found is None:
            continue
        kind, cls = found
        if reason := obstacle(module, kind, cls, options):
            report.left[name] = reason
        else:
            report.patch(name, module, FORWARDS[kind](module), KINDS[kind].operator)
    if not report.replaced and not report.left:
        known = ", ".join(f"{prefix}Model" for prefix in FAMILIES.values())
        report.left[""] = f"{type(model).__name__} contains no {known}"
    return report


def recognise(module: nn.Module) -> tuple[str, type] | None:
    """The kind of a module and the transformers class that makes it one; a class derived from it counts."""
    for cls in type(module).__mro__:
        for model_type, prefix in FAMILIES.items():
            kind = cls.__name__.removeprefix(prefix)
            if kind in KINDS and cls.__module__ == f"transformers.models.{model_type}.modeling_{model_type}":
                return (kind, cls) if cls.__name__ == prefix + kind else None
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


def _norm_obstacle(module: Any) -> str:
    dtype: torch.dtype = module.weight.dtype
    return "" if dtype in FLOAT_DTYPES else f"its weight is {dtype}; rms_norm takes float32, bfloat16 and float16"


OBSTACLES: dict[str, Callable[[Any], str]] = {"RMSNorm": _norm_obstacle}

FORWARDS: dict[str, Callable[[nn.Module], Callable[..., Any]]] = {
    "RMSNorm": lambda module: llama_layout.norm_forward,
    "DecoderLayer": lambda module: llama_layout.checkpointed(llama_layout.decoder_layer_forward),
}
