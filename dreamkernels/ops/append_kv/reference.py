"""The definition of append_kv in plain PyTorch."""

from __future__ import annotations

import torch

from dreamkernels.ops.rms_norm.reference import rms_norm
from dreamkernels.ops.rotary.reference import rotate


def append_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_norm_weight: torch.Tensor | None = None,
    k_norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:
    if q_norm_weight is not None:
        q = rms_norm(q, q_norm_weight, eps)
    if k_norm_weight is not None:
        k = rms_norm(k, k_norm_weight, eps)
    positions = cache_seqlens.long()[:, None] + torch.arange(q.shape[1], device=q.device)  # [B, N]
    cos, sin = cos[positions][:, :, None], sin[positions][:, :, None]
    sequence = torch.arange(q.shape[0], device=q.device)[:, None]
    page, slot = sequence, positions
    if block_table is not None:
        page, slot = block_table.long()[sequence, positions // k_cache.shape[1]], positions % k_cache.shape[1]
    k_cache[page, slot] = rotate(k, cos, sin)
    v_cache[page, slot] = v
    return rotate(q, cos, sin)
