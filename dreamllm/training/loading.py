"""A model folder read into parameters that exist nowhere as a whole: each process reads only what it keeps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.overrides import TorchFunctionMode

from dreamllm.model import DreamLLM, DreamLLMConfig
from dreamllm.model.weights import SAFETENSORS, CheckpointError, check_tensors


class _EmptyOnMeta(TorchFunctionMode):
    """`torch.empty`, of which modules make their weights, takes no memory; what has values (rotary tables) is made."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **({**kwargs, "device": "meta"} if func is torch.empty else kwargs))


def empty_model(folder: Path, dtype: torch.dtype) -> DreamLLM:
    """The model of `folder`: its buffers have their values, its parameters are in `dtype` and on the meta device.

    `ShardedModel` gives each process its part of them. Raises `CheckpointError` when the folder has no safetensors
    files, or when they do not fit the model, naming every tensor that is missing, mis-shaped or unexpected.
    """
    with _EmptyOnMeta():
        model = DreamLLM(DreamLLMConfig.from_pretrained(folder))
    model.use_fused_operators(False)  # which may hold weights in other forms
    model.tie_weights()
    for parameter in model.parameters():
        replace(parameter, torch.empty(parameter.shape, dtype=dtype, device="meta"))
    known = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    tied = set(model.state_dict()) - set(known)
    found = {name: tensor for name, tensor in _headers(folder).items() if name not in tied}
    check_tensors(known, found, str(folder))
    return model


def replace(parameter: nn.Parameter, tensor: Tensor) -> None:
    """Makes `parameter` hold `tensor`, whatever device it was on; modules that share it go on sharing it."""
    torch.utils.swap_tensors(parameter, nn.Parameter(tensor, parameter.requires_grad))


def read_parameters(folder: Path | None, tensors: Mapping[str, Tensor]) -> None:
    """Fills `tensors`, of any dtype, from the safetensors files of `folder`; of a sharded one, only this process' part.

    `folder` may be None when there are none. Raises `CheckpointError`.
    """
    if not tensors:
        return
    assert folder is not None, "parameters without contents need the folder that they are in"
    try:
        dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except (dcp.api.CheckpointException, SafetensorError, OSError) as error:
        raise CheckpointError(f"the weights in {folder} could not be read: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder. Raises `CheckpointError` when there are none."""
    files = sorted(folder.glob(f"{Path(SAFETENSORS).stem}*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder} has no {SAFETENSORS}, whole or in parts; a model that is spread over processes is read from "
            "safetensors files: load it once with DreamLLM.from_pretrained and save it with save_pretrained"
        )
    return files


def _headers(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder, with its shape and no contents."""
    return {name: tensor for path in weight_files(folder) for name, tensor in _header(path)}


def _header(path: Path) -> list[tuple[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            return [(name, torch.empty(file.get_slice(name).get_shape(), device="meta")) for name in file.keys()]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt: {error}") from error


def read_tensors(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Those of `names` that the safetensors files of a model folder hold, one after the other."""
    wanted = set(names)
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                if name in wanted:
                    yield name, file.get_tensor(name)
