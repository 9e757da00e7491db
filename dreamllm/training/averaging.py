"""An average of the trained parameters over the steps of a stage, in float32, beside them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dreamllm.training.configuration import EmaSettings


class Average:
    """`average += (1 - d) * (parameters - average)` after every step, spread over processes as the parameters are.

    d is `settings.decay_at(step)`. A step whose update was skipped counts with its unchanged parameters.
    """

    def __init__(self, parameters: Mapping[str, Tensor], settings: EmaSettings) -> None:
        self.parameters, self.settings = dict(parameters), settings
        self.tensors = {name: p.detach().to(torch.float32, copy=True) for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step `step`, counted from 1."""
        averages = [_local(tensor) for tensor in self.tensors.values()]
        values = [_local(parameter.detach()).float() for parameter in self.parameters.values()]
        get_ema_multi_avg_fn(self.settings.decay_at(step))(averages, values, 0)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
