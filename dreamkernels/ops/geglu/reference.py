"""GEGLU (Shazeer, GLU Variants Improve Transformer, 2020) with exact GELU: the definition."""

import torch
import torch.nn.functional as F


def geglu(x: torch.Tensor) -> torch.Tensor:
    hidden, gate = x.chunk(2, dim=-1)
    return hidden * F.gelu(gate)
