"""Softmax of every group of successive elements: the definition."""

import torch


def softmax_groups(x: torch.Tensor, size: int) -> torch.Tensor:
    return torch.softmax(x.unflatten(-1, (-1, size)), -1).flatten(-2)
