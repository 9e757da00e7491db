"""Scaled dot-product attention over packed or dense sequences: the definition, quadratic in memory."""

from __future__ import annotations

from typing import Any

import torch


def visible_keys(
    len_q: int, len_k: int, causal: bool, window: int, device: torch.device | None = None
) -> torch.Tensor | None:
    """bool [len_q, len_k]: whether query i sees key j, aligned at the last query and the last key. None: all are."""
    if not causal and window < 0:
        return None
    distance = torch.arange(len_k, device=device) - (torch.arange(len_q, device=device)[:, None] + len_k - len_q)
    visible = distance <= 0 if causal else distance < window
    return visible & (distance > -window) if window >= 0 else visible


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float, window: int, softcap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One batch of equally long sequences: q [B, H, L_q, D], k and v [B, H, L_k, D] -> out [B, H, L_q, D], lse."""
    scores = (q @ k.transpose(-1, -2)) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    visible = visible_keys(q.shape[-2], k.shape[-2], causal, window, q.device)
    if visible is None:
        sees_a_key = torch.full((q.shape[-2], 1), k.shape[-2] > 0, device=q.device)
    else:
        sees_a_key = visible.any(-1, keepdim=True)
        # A row that sees nothing is computed over everything and then dropped, which keeps NaN out of its gradient.
        scores = scores.masked_fill(~(visible | ~sees_a_key), -torch.inf)
    probabilities = (scores.softmax(-1) * sees_a_key).to(q.dtype)
    lse = torch.where(sees_a_key[:, 0], scores.logsumexp(-1), -torch.inf)
    return probabilities @ v, lse


def _without_gradient(keys: torch.Tensor, prefix: int) -> torch.Tensor:
    """keys [..., L_k, D] whose first `prefix` positions are constants."""
    return torch.cat([keys[..., :prefix, :].detach(), keys[..., prefix:, :]], dim=-2) if prefix else keys


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    constant_kv_prefix: torch.Tensor | None,
    causal: bool,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator, one sequence after another. Reads the lengths on the host."""
    group = q.shape[-2] // max(1, k.shape[-2])
    sequences: list[tuple[Any, Any]] = [(index, index) for index in range(q.shape[0])]
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        sequences = [(slice(*bounds_q[n : n + 2]), slice(*bounds_k[n : n + 2])) for n in range(len(bounds_q) - 1)]
    prefixes = [0] * len(sequences) if constant_kv_prefix is None else constant_kv_prefix.tolist()
    outputs, lses = [], []
    for (rows, keys), prefix in zip(sequences, prefixes, strict=True):
        q_HLD = q[rows].transpose(0, 1)
        k_HLD, v_HLD = (_without_gradient(t[keys].transpose(0, 1).repeat_interleave(group, 0), prefix) for t in (k, v))
        out, lse = attend(q_HLD, k_HLD, v_HLD, causal, scale, window, softcap)
        outputs.append(out.transpose(0, 1))
        lses.append(lse)
    if cu_seqlens_q is None:
        if outputs:
            return torch.stack(outputs), torch.stack(lses)
        return q * 1, q.new_empty((0, q.shape[2], q.shape[1]), dtype=torch.promote_types(q.dtype, torch.float32))
    if outputs:
        return torch.cat(outputs), torch.cat(lses, dim=1)
    return q * 1, q.new_empty((q.shape[1], 0), dtype=torch.promote_types(q.dtype, torch.float32))
