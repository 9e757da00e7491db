"""Adapters of low rank in the decoder's layers, by peft: they train in the place of the layers' own weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dreamllm.model import DreamLLM
from dreamllm.training.configuration import LoraSettings
from dreamllm.training.frozen import ADAPTED, layers_of
from dreamllm.training.loading import read_tensors

_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"
_LANGUAGE_MODEL = "language_model."


def add_adapters(model: DreamLLM, settings: LoraSettings, seed: int) -> None:
    """Puts adapters into the decoder's layers, in place; with B zero they change nothing yet. See `fill_adapters`.

    Raises `ImportError` without peft, and `ValueError` for targets that the layers do not have.
    """
    found = {
        name.rpartition(".")[2] for name, module in layers_of(model)[0].named_modules() if type(module) is nn.Linear
    }
    unknown = set(settings.targets) - found
    if unknown:
        raise ValueError(
            f"lora.targets {', '.join(sorted(unknown))}: no such projections; there are {', '.join(sorted(found))}"
        )
    peft = _peft()
    peft.inject_adapter_in_model(_config(peft, settings), model.language_model)
    fill_adapters(model.named_parameters(), seed)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("lora needs the package peft: pip install peft") from error
    return peft


def _config(peft: Any, settings: LoraSettings) -> Any:
    return peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
        task_type="CAUSAL_LM",
    )


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return ".lora_" in name


def stored_name(name: str) -> str:
    """What a parameter is called in a model without adapters."""
    return name.replace(ADAPTED, ".")


def train_adapters_only(model: DreamLLM) -> None:
    """Of the group "language_model" (the decoder's layers and last norm), the adapters alone require a gradient."""
    adapters = {id(p) for name, p in model.named_parameters() if is_adapter(name)}
    for parameter in model.parameter_groups()["language_model"]:
        parameter.requires_grad_(id(parameter) in adapters)


@torch.no_grad()
def fill_adapters(named: Iterable[tuple[str, Tensor]], seed: int) -> None:
    """Gives those of the parameters that belong to adapters and have memory their first values: A uniform in
    +-1/sqrt(width), as peft and `nn.Linear` have it, B zero. A function of (seed, name), however they are spread."""
    for name, parameter in named:
        if not is_adapter(name) or parameter.is_meta:
            continue
        value = torch.zeros(parameter.shape)
        if name.endswith(_A):
            number = int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest(), "little")
            bound = 1 / math.sqrt(parameter.shape[1])
            value.uniform_(-bound, bound, generator=torch.Generator().manual_seed(number))
        value = value.to(parameter.device, parameter.dtype)
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(value)


def merged(trained: dict[str, Tensor], settings: LoraSettings, source: Path) -> dict[str, Tensor]:
    """`trained`, whole tensors by name, without adapters: W + alpha / rank * B A replaces each adapted W."""
    others = {stored_name(name): tensor for name, tensor in trained.items() if not is_adapter(name)}
    adapted = {f"{name.removesuffix(_A)}.weight": name.removesuffix(_A) for name in trained if name.endswith(_A)}
    for name, weight in read_tensors(source, adapted):
        a, b = (trained[adapted[name] + part] for part in (_A, _B))
        delta = (settings.alpha / settings.rank) * (b.float() @ a.float())
        others[name] = (weight.float() + delta).to(a.dtype)
    return others


def save_adapter(folder: Path, trained: dict[str, Tensor], settings: LoraSettings, source: Path) -> None:
    """Writes the adapters of `trained` so that `peft.PeftModel.from_pretrained(model.language_model, folder)` reads
    them, `model` being that of the folder `source`."""
    config = _config(_peft(), settings)
    config.base_model_name_or_path, config.inference_mode = str(source), True
    config.save_pretrained(str(folder))
    tensors = {
        "base_model.model." + name.removeprefix(_LANGUAGE_MODEL).replace(".default.", "."): tensor.contiguous()
        for name, tensor in trained.items()
        if is_adapter(name)
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
