"""The definition of rotary in plain PyTorch."""

from __future__ import annotations

import torch


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turned, kept = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
    turned = (turned * cos + rotate_half(turned) * sin).to(x.dtype)
    return torch.cat((turned, kept), -1)


def rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None,
    heads_first: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if position_ids is not None:
        shape = (*position_ids.shape, cos.shape[-1])
        cos = cos.index_select(0, position_ids.reshape(-1)).view(shape)
        sin = sin.index_select(0, position_ids.reshape(-1)).view(shape)
    if q.dim() == 3:  # packed: a leading dimension of one is allowed in the tables
        cos, sin = cos.reshape(cos.shape[-2:]), sin.reshape(sin.shape[-2:])
    heads = -3 if heads_first else -2
    cos, sin = cos.unsqueeze(heads), sin.unsqueeze(heads)
    return rotate(q, cos, sin), rotate(k, cos, sin)
