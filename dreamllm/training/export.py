"""A model folder from what was trained, which may be spread over processes, and the folder where it began."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from dreamllm.model import DreamLLM, DreamLLMConfig
from dreamllm.model.weights import CheckpointError
from dreamllm.training.loading import read_tensors
from dreamllm.training.sharding import gathered


def gather(named: Iterable[tuple[str, Tensor]], main: bool, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors, whole, in `dtype` and in host memory of the main process; none in the others. All must call it."""
    return {name: tensor.cpu().to(dtype or tensor.dtype) for name, tensor in gathered(named) if main}


def save_whole(folder: Path, config: DreamLLMConfig, trained: dict[str, Tensor], source: Path) -> None:
    """Writes a model as `save_pretrained` does: `trained` and, for what is frozen, the tensors of the folder `source`.

    Frozen tensors may be held in a smaller dtype than they were read in, so they come from where they came from.
    """
    with torch.device("meta"):
        whole = DreamLLM(config)
    names = set(whole.state_dict()) - set(trained)
    dtype = next(iter(trained.values())).dtype
    tensors = {**trained, **{name: tensor.to(dtype) for name, tensor in read_tensors(source, names)}}
    whole.load_state_dict(tensors, strict=False, assign=True)
    whole.tie_weights()
    absent = [name for name, parameter in whole.named_parameters() if parameter.is_meta]
    if absent:
        raise CheckpointError(f"{source} lacks {', '.join(absent)}")
    whole.save_pretrained(folder)
