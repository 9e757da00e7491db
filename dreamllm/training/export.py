"""A model folder from a model that is spread over processes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dreamllm.model import DreamLLM
from dreamllm.model.weights import CheckpointError
from dreamllm.training.loading import read_tensors
from dreamllm.training.sharding import ShardedModel, gathered
from dreamllm.training.step import Pass


def gather_trained(through: Pass, main: bool) -> dict[str, Tensor] | None:
    """The trained parameters of a sharded model, whole, in host memory of the main process; empty in the others.

    None for a model that is whole anyway. All processes must call it.
    """
    if not isinstance(through, ShardedModel):
        return None
    return {name: tensor.cpu() for name, tensor in gathered(through.model) if main}


def save_whole(folder: Path, model: DreamLLM, trained: dict[str, Tensor], source: Path) -> None:
    """Writes `model` as `save_pretrained` does: `trained` and, for what is frozen, the tensors of the folder `source`.

    Frozen tensors may be held in a smaller dtype than they were read in, so they come from where they came from.
    """
    with torch.device("meta"):
        whole = DreamLLM(model.config)
    names = set(whole.state_dict()) - set(trained)
    dtype = next(iter(trained.values())).dtype
    tensors = {**trained, **{name: tensor.to(dtype) for name, tensor in read_tensors(source, names)}}
    whole.load_state_dict(tensors, strict=False, assign=True)
    whole.tie_weights()
    absent = [name for name, parameter in whole.named_parameters() if parameter.is_meta]
    if absent:
        raise CheckpointError(f"{source} lacks {', '.join(absent)}")
    whole.save_pretrained(folder)
