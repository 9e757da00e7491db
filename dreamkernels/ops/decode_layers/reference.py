"""The definition of decode_layers and few_rows_linear in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from dreamkernels.ops.append_kv.reference import append_kv
from dreamkernels.ops.decode_attention.reference import decode_attention
from dreamkernels.ops.rms_norm.reference import rms_norm
from dreamkernels.ops.swiglu.reference import swiglu


def decode_layers(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    norm_weight: torch.Tensor,
    kv_cache: torch.Tensor,
    positions: torch.Tensor,
    block_table: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    scale: float,
    window: int,
) -> torch.Tensor:
    width = kv_cache.shape[-1]
    for layer in range(len(weights) // 9):
        attention_norm, *qkv_weights, out, mlp_norm, gate, up, down = weights[9 * layer : 9 * layer + 9]
        keys, values = kv_cache[2 * layer], kv_cache[2 * layer + 1]
        normed = rms_norm(x, attention_norm, eps)
        q, k, v = (F.linear(normed, weight).unflatten(-1, (1, -1, width)) for weight in qkv_weights)
        q = append_kv(q, k, v, keys, values, positions, cos, sin, block_table=block_table)
        attended, _ = decode_attention(q, keys, values, positions + 1, block_table, True, scale, window, 0.0)
        x = x + F.linear(attended.flatten(1), out)
        normed = rms_norm(x, mlp_norm, eps)
        x = x + F.linear(swiglu(F.linear(normed, gate), F.linear(normed, up)), down)
    return rms_norm(x, norm_weight, eps)


def few_rows_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.linear(x, weight, bias)
