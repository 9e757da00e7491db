"""Group normalisation (Wu and He, 2018) with a shift of the channels before it and SiLU after it: the definition."""

import torch
import torch.nn.functional as F


def group_norm_silu(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    activation: str,
    shift: torch.Tensor | None,
) -> torch.Tensor:
    if shift is not None:
        x = x + shift[(...,) + (None,) * (x.dim() - 2)]
    y = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(y) if activation == "silu" else y
